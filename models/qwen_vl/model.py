"""Qwen-VL: visual features take the place of placeholder tokens in a causal language model.

Qwen2.5-VL (arXiv 2502.13923) with its sizes, here; Qwen3-VL (arXiv 2511.21631) is another config of the same: qwen3.py.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ...kernels.window_attention import RaggedWindows
from ..cache import Cache
from ..published import Published, floats, integers
from ..ranges import Positive, Whole
from .deepstack import DeepStackConfig, DeepStackEncoder
from .experts import RouterLoad
from .language import LanguageModel, TextConfig
from .vision import Features, VisionConfig, VisionEncoder, VisionInput


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """The two towers and the special tokens that join them."""

    text: TextConfig
    vision: VisionConfig | DeepStackConfig
    image_token: Whole = 151655
    video_token: Whole = 151656
    tokens_per_second: Positive = 2  # positions that a video takes in time, where the encoder is that of Qwen2.5-VL

    def __post_init__(self) -> None:
        if self.vision.out_width != self.text.width:
            raise ValueError(f"vision.out_width {self.vision.out_width} differs from text.width {self.text.width}")

    @property
    def timestamps(self) -> bool:
        """Whether the times of a video's frames stand in the text, and frames are placed as images (Qwen3-VL)."""
        return isinstance(self.vision, DeepStackConfig)


# Released sizes: language width, depth, heads, kv heads, MLP, vocabulary, tied embeddings; vision MLP (their
# config.json).
SIZES: dict[str, tuple[int, int, int, int, int, int, bool, int]] = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}


def config(size: str, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> QwenVLConfig:
    """The config of a released size; `text` and `vision` override fields of the two towers."""
    if size not in SIZES:
        raise ValueError(f"unknown Qwen2.5-VL size {size!r}, expected one of {list(SIZES)}")
    width, depth, heads, kv_heads, mlp_dim, vocab, tied, vision_mlp = SIZES[size]
    fields: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 128,
        "mlp_dim": mlp_dim,
        "vocab_size": vocab,
        "tie_embeddings": tied,
    }
    return QwenVLConfig(
        text=TextConfig(**(fields | (text or {}))),
        vision=VisionConfig(**{"mlp_dim": vision_mlp, "out_width": width, **(vision or {})}),
    )


# The encoder as the user's notes describe it: 16x16 patches, 7x7 windows shifted in every second block, one learnable
# global query per four blocks, no block of full attention, a two-layer neck.
NOTES_VISION: dict[str, Any] = {
    "patch_size": 16,
    "window": 7,
    "shifted": True,
    "full_blocks": (),
    "global_query_every": 4,
}


@flax.struct.dataclass
class Output:
    """What a forward pass gives; `logits` are absent where only hidden states were asked for."""

    hidden: Float[Array, "B T D"]
    logits: Float[Array, "*B V"] | None
    cache: Cache | None
    load: RouterLoad | None = None  # of the experts of every layer


def forward(model: "QwenVL", params: Any, *args: Any, **options: Any) -> Output:
    """`model(*args, **options)` with these parameters."""
    out = model.apply({"params": params}, *args, **options)
    assert isinstance(out, Output)
    return out


def init_params(model: "QwenVL", rng: Array) -> dict[str, Any]:
    """Initial values: matrices and embeddings N(0, 0.02), norms 1, biases 0."""
    c = model.config.vision
    patches = c.merge_size**2
    windows = RaggedWindows(jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, patches), jnp.int32))
    vision = VisionInput(
        patches=jnp.zeros((1, patches, c.patch_dim)),
        coordinates=jnp.zeros((1, patches, 2), jnp.int32),
        frame_ids=jnp.ones((1, patches), jnp.int32),
        windows=windows,
        shifted_windows=windows,
        grid_sizes=jnp.full((1, patches, 2), c.merge_size),
    )
    tokens, positions = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, 3), jnp.int32)
    variables: Any = model.init(rng, tokens, positions, vision=vision, visual_index=tokens, num_frames=1)
    return variables["params"]


class QwenVL(nn.Module):
    """Tokens and packed images or videos -> next-token scores."""

    config: QwenVLConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        vision = self.config.vision
        encoder = DeepStackEncoder if isinstance(vision, DeepStackConfig) else VisionEncoder
        self.visual = encoder(vision, self.dtype)  # type: ignore[arg-type]
        self.language = LanguageModel(self.config.text, self.dtype)

    def encode(self, vision: VisionInput, num_frames: int = 0) -> Features:
        """Features of packed images and videos, in the language model's width."""
        features = self.visual(vision, num_frames)
        return features if isinstance(features, Features) else Features(features)

    def embed(
        self, tokens: Int[Array, "B T"], features: Features | None, visual_index: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None]:
        """Token vectors, with feature number visual_index where that is not -1, and DeepStack's features there."""
        x = self.language.embed(tokens)
        if features is None:
            return x, None
        assert visual_index is not None
        is_text, index = visual_index[..., None] < 0, visual_index.clip(0)[..., None]
        x = jnp.where(is_text, x, jnp.take_along_axis(features.merged, index, axis=1).astype(x.dtype))
        if features.deep is None:
            return x, None
        return x, jnp.where(is_text, 0, jnp.take_along_axis(features.deep, index[None], axis=2).astype(x.dtype))

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 next-token scores of hidden states."""
        return self.language.logits(hidden)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T 3"],
        *,
        vision: VisionInput | None = None,
        visual_index: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        last: Int[Array, " B"] | None = None,
        num_frames: int = 0,
        with_logits: bool = True,
    ) -> Output:
        """One forward pass.

        Args:
          tokens: Token ids, padded on the right.
          positions: Time, height and width of every token (data/conversations/vision_tokens.py mrope_positions).
          vision: The row's images and videos; None for text alone, and when decoding after the prompt.
          visual_index: Which merged feature of its row stands at a token, -1 for text.
          segment_ids: Tokens see tokens of their own segment only (packed sequences).
          cache: Keys and values of what came before; the new ones are written behind them.
          last: Column of each row whose logits are wanted, alone: [B, V] instead of [B, T, V].
          num_frames: Bound on the frames in a row of `vision`, for encoders with global queries.
          with_logits: False leaves the scores to the caller (a loss that takes them in chunks).
        """
        features = None if vision is None else self.encode(vision, num_frames)
        x, deep = self.embed(tokens, features, visual_index)
        hidden, cache, load = self.language(x, positions, segment_ids=segment_ids, cache=cache, deep=deep)
        if last is not None:
            chosen = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            return Output(hidden, self.logits(chosen), cache, load)
        return Output(hidden, self.logits(hidden) if with_logits or self.is_initializing() else None, cache, load)


def picture_and_text(c: QwenVLConfig, patches: int, **places: Any) -> dict[str, Any]:
    """Abstract inputs: one square picture of so many patches among 64 tokens of text; `places` as in VisionInput."""
    vision = VisionInput(
        floats(1, patches, c.vision.patch_dim), integers(1, patches, 2), integers(1, patches), **places
    )
    tokens = patches // c.vision.merge_size**2 + 64
    return {
        "tokens": integers(1, tokens),
        "positions": integers(1, tokens, 3),
        "vision": vision,
        "visual_index": integers(1, tokens),
    }


def published(size: str) -> Published:
    """A released size; a forward pass is of one picture of 448 x 448 pixels among 64 tokens of text."""
    c = config(size)
    assert isinstance(c.vision, VisionConfig)
    rows = 448 // c.vision.patch_size
    windows = RaggedWindows(integers(1, (rows // c.vision.window) ** 2, c.vision.window**2), integers(1, rows**2))
    return Published(
        # The encoder stays unrolled: its blocks see windows or whole frames, a scan has one body for both.
        build=lambda scan: QwenVL(config(size, text={"scan": scan})),
        inputs=picture_and_text(c, rows**2, windows=windows),
        checkpoint=f"Qwen/Qwen2.5-VL-{size}-Instruct",
    )


PUBLISHED = {size: published(size) for size in SIZES}
