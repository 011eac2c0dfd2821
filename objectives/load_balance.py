"""The auxiliary loss that keeps a router from sending all tokens to a few experts."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Pool = Literal["batch", "row"]


def load_balance(
    chosen: Float[Array, "L B E"],
    probability: Float[Array, "L B E"],
    tokens: Float[Array, "L B"],
    pool: Pool = "batch",
) -> Float[Array, ""]:
    """E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4-6): f is how often a token chose e, P its probability.

    The arguments are sums over the tokens of every row. Shares are of the tokens of all layers and rows together, on
    all devices ("batch": global-batch balance, arXiv 2501.11873, as transformers computes it), or of each row by
    itself and then averaged ("row": experts may then specialise less). Equal loads give the number of chosen experts.
    """
    rows = "b" if pool == "row" else ""
    counts, probabilities = (jnp.einsum(f"lbe->{rows}e", x) for x in (chosen, probability))
    total = jnp.maximum(jnp.einsum(f"lb->{rows}", tokens), 1.0)[..., None]
    loss = chosen.shape[-1] * (counts / total * (probabilities / total)).sum(-1)
    if not rows:
        return loss
    filled = tokens.sum(0) > 0
    return (loss * filled).sum() / jnp.maximum(filled.sum(), 1)
