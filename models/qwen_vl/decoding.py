"""Answers of a Qwen-VL model: prefill in a bucket, then the decode loop; each compiles once per bucket."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ...kernels.window_attention import RaggedWindows
from ..cache import Cache
from ..generation import Decoding, Sampling, decode, start
from .language import empty_cache
from .model import QwenVL, forward
from .vision import VisionInput

Batch = Mapping[str, Any]  # data/conversations/qwen_vl.py collate


def vision_input(batch: Batch) -> VisionInput | None:
    """The packed images and videos of a batch; None where it has none."""
    if "patches" not in batch:
        return None

    def windows(prefix: str) -> RaggedWindows | None:
        token = batch.get(f"{prefix}_token")
        return None if token is None else RaggedWindows(token, batch[f"{prefix}_slot"])

    return VisionInput(
        patches=batch["patches"],
        coordinates=batch["coordinates"],
        frame_ids=batch["frame_ids"],
        windows=windows("window"),
        shifted_windows=windows("shifted_window"),
        grid_sizes=batch.get("grid_sizes"),
    )


def prefill(
    model: QwenVL, params: Any, batch: Batch, capacity: int, *, num_frames: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs the prompts: the logits behind each row's last token, and a cache with room for `capacity` positions."""
    tokens = batch["tokens"]
    lengths = batch["lengths"]
    cache = empty_cache(model.config.text, len(tokens), capacity, dtype)
    out = forward(
        model,
        params,
        tokens,
        batch["positions"],
        vision=vision_input(batch),
        visual_index=batch.get("visual_index"),
        cache=cache,
        last=lengths - 1,
        num_frames=num_frames,
    )
    assert out.logits is not None and out.cache is not None
    return out.logits, out.cache.extend(lengths)


def continue_answer(
    model: QwenVL, params: Any, rope_delta: Int[Array, " B"], state: Decoding, sampling: Sampling, limit: Any
) -> Decoding:
    """Decodes until `limit` tokens of the answers are written (see models/generation.py)."""

    def step(tokens: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        positions = jnp.broadcast_to((cache.length + rope_delta)[:, None, None], (len(tokens), 1, 3))
        out = forward(model, params, tokens[:, None], positions, cache=cache)
        assert out.logits is not None and out.cache is not None
        return out.logits[:, 0], dataclasses.replace(out.cache, length=cache.length + 1)

    return decode(step, state, sampling, limit)


@dataclasses.dataclass(frozen=True)
class Generator:
    """Compiled generation with one model; every bucket of prompt length and batch size compiles once.

    `stream_every` tokens at a time come back to the host when somebody listens.
    """

    model: QwenVL
    sampling: Sampling
    num_frames: int = 0
    dtype: DTypeLike = jnp.float32  # of the cache
    stream_every: int = 4

    @functools.cached_property
    def _prefill(self) -> Callable[..., Decoding]:
        def run(params: Any, batch: Batch, rng: Array) -> Decoding:
            capacity = batch["tokens"].shape[1] + self.sampling.max_new_tokens
            logits, cache = prefill(self.model, params, batch, capacity, num_frames=self.num_frames, dtype=self.dtype)
            mask = jnp.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
            return start(logits, cache, batch["tokens"], mask, self.sampling, rng)

        return jax.jit(run)

    @functools.cached_property
    def _continue(self) -> Callable[..., Decoding]:
        def run(params: Any, rope_delta: Array, state: Decoding, limit: Array) -> Decoding:
            return continue_answer(self.model, params, rope_delta, state, self.sampling, limit)

        return jax.jit(run, donate_argnums=2)

    def __call__(
        self, params: Any, batch: Batch, rng: Array, on_tokens: Callable[[np.ndarray], None] | None = None
    ) -> Int[np.ndarray, "B T"]:
        """The answers' tokens, filled with the pad token behind a stop token.

        `on_tokens` gets the new columns [B, n] as they come.
        """
        state = self._prefill(params, batch, rng)
        most = self.sampling.max_new_tokens
        written = 0
        while written < most:
            if not bool(jnp.isfinite(state.logits).all()):
                raise ValueError("the scores of the next token are not finite (damaged weights?)")
            limit = min(written + self.stream_every, most) if on_tokens else most
            state = self._continue(params, batch["rope_delta"], state, jnp.int32(limit))
            reached = int(state.step)
            if on_tokens:
                on_tokens(np.asarray(state.tokens[:, written:reached]))
            if reached < limit or bool(state.done.all()):
                break
            written = reached
        return np.asarray(state.tokens)
