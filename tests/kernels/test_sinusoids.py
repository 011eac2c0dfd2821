"""Sinusoidal embeddings, number by number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from omnax.kernels.sinusoids import sinusoids


@pytest.mark.parametrize(("shift", "cosines_first"), [(0, True), (1, False)])
def test_every_number_by_hand(shift, cosines_first):
    numbers = [[0.0, 1.0], [52.579, 999.0]]
    got = sinusoids(jnp.asarray(numbers), 6, shift=float(shift), cosines_first=cosines_first)
    for i, row in enumerate(numbers):
        for j, t in enumerate(row):
            angles = [t * 10000 ** (-k / (3 - shift)) for k in range(3)]
            pair = [list(map(math.cos, angles)), list(map(math.sin, angles))]
            expected = np.concatenate(pair if cosines_first else pair[::-1])
            np.testing.assert_allclose(got[i, j], expected, atol=1e-4)  # float32 of an angle of 1000


def test_whole_numbers_and_an_odd_width():
    np.testing.assert_array_equal(sinusoids(jnp.asarray([3, 4]), 8), sinusoids(jnp.asarray([3.0, 4.0]), 8))
    with pytest.raises(ValueError, match="width is 7, expected an even number"):
        sinusoids(jnp.asarray([1]), 7)
