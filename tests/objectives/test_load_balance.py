"""The balance of experts: by hand, and beside transformers' loss."""

import jax.numpy as jnp
import numpy as np
from omnax.objectives.load_balance import load_balance


def loads(logits, mask, top):
    """[L, B, T, E] -> what the routers did, as sums over each row's tokens."""
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.zeros_like(logits)
    np.put_along_axis(chosen, np.argsort(-logits, -1)[..., :top], 1, -1)
    kept = mask[None, :, :, None]
    arrays = (chosen * kept).sum(2), (probability * kept).sum(2), np.tile(mask.sum(1), (len(logits), 1))
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_equal_loads_give_the_number_of_chosen_experts():
    chosen, probability = jnp.full((3, 2, 4), 10.0), jnp.full((3, 2, 4), 5.0)
    tokens = jnp.full((3, 2), 20.0)
    for pool in ("batch", "row"):
        np.testing.assert_allclose(load_balance(chosen, probability, tokens, pool), 2, rtol=1e-6)


def test_rows_by_themselves_are_stricter():
    """Two rows that each have an expert of their own: even together, not apart; an empty row counts for nothing."""
    chosen = jnp.array([[[8.0, 0.0], [0.0, 8.0], [0.0, 0.0]]])
    tokens = jnp.array([[8.0, 8.0, 0.0]])
    np.testing.assert_allclose(load_balance(chosen, chosen, tokens, "batch"), 1)
    np.testing.assert_allclose(load_balance(chosen, chosen, tokens, "row"), 2)


def test_equals_transformers_with_padding():
    from oracles import torch, transformers

    theirs = transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.load_balancing_loss_func
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 4, 7, 8)).astype(np.float32)
    mask = np.arange(7) < rng.integers(1, 8, (4, 1))
    gates = tuple(torch.tensor(layer.reshape(-1, 8)) for layer in logits)
    expected = theirs(gates, 8, 2, torch.tensor(mask))
    np.testing.assert_allclose(load_balance(*loads(logits, mask, 2)), expected, rtol=1e-5)
