"""Schedules at points worked out by hand."""

import math

import pytest
from omnax.train.schedules import Schedule, anneal


def factors(schedule: Schedule, total: int, *steps: int) -> list[float]:
    return [float(schedule(step, total)) for step in steps]


def test_cosine_with_warmup():
    """Warm-up 0, 1/4, ...; then cos over the remaining 8 steps: at step 8 half of it is over."""
    schedule = Schedule(kind="cosine", warmup=4, end=0.2)
    expected = [0.0, 0.25, 1.0, 0.6, 0.2, 0.2]
    assert factors(schedule, 12, 0, 1, 4, 8, 12, 20) == pytest.approx(expected, abs=1e-6)
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert factors(schedule, 12, 6) == pytest.approx([quarter], abs=1e-6)


def test_inclusive_warmup_peaks_on_its_last_step():
    schedule = Schedule(kind="linear", warmup=4, inclusive=True)
    assert factors(schedule, 8, 0, 1, 3, 4, 6) == pytest.approx([0, 1 / 3, 1, 1, 0.5])
    assert factors(Schedule(kind="constant", warmup=1, inclusive=True), 8, 0, 1) == pytest.approx([0, 1])


def test_linear_constant_and_rsqrt():
    assert factors(Schedule(kind="linear", end=0.5), 10, 0, 5, 10) == pytest.approx([1, 0.75, 0.5])
    assert factors(Schedule(kind="constant", warmup=2), 10, 1, 2, 9) == pytest.approx([0.5, 1, 1])
    schedule = Schedule(kind="rsqrt", warmup=10, timescale=100)
    assert factors(schedule, 1000, 10, 310) == pytest.approx([1, 0.5])


def test_cooldown_multiplies_the_curve():
    assert factors(Schedule(kind="constant", cooldown=4), 10, 5, 6, 8, 10) == pytest.approx([1, 1, 0.5, 0])


def test_anneal_and_unknown_kind():
    assert [float(anneal(0.04, 0.4, p)) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    with pytest.raises(ValueError, match="unknown schedule 'cosin', did you mean 'cosine'"):
        Schedule(kind="cosin")
