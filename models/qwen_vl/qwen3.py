"""Qwen3-VL (arXiv 2511.21631): the sizes, dense and with experts. Instruct and Thinking differ in weights alone."""

from typing import Any

from ..published import Published, integers
from .deepstack import DeepStackConfig
from .language import TextConfig
from .model import QwenVL, QwenVLConfig, picture_and_text

# Released sizes (their config.json): language width, depth, heads, key heads, MLP; experts, chosen, their MLP; tied.
SIZES: dict[str, tuple[int, int, int, int, int, int, int, int, bool]] = {
    "2B": (2048, 28, 16, 8, 6144, 0, 0, 0, True),
    "4B": (2560, 36, 32, 8, 9728, 0, 0, 0, True),
    "8B": (4096, 36, 32, 8, 12288, 0, 0, 0, False),
    "32B": (5120, 64, 64, 8, 25600, 0, 0, 0, False),
    "30B-A3B": (2048, 48, 32, 4, 6144, 128, 8, 768, False),
    "235B-A22B": (4096, 94, 64, 4, 12288, 128, 8, 1536, False),
}
# SigLIP-2 Large in the two small sizes; the default of DeepStackConfig, SO-400M, in the others.
LARGE: dict[str, Any] = {"depth": 24, "width": 1024, "mlp_dim": 4096, "deepstack_blocks": (5, 11, 17)}
# What makes the language model Qwen3, whatever its size.
QWEN3: dict[str, Any] = {
    "qkv_bias": False,
    "qk_norm": True,
    "rope_theta": 5e6,
    "mrope_section": (24, 20, 20),
    "mrope_interleaved": True,
}


def config(size: str, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> QwenVLConfig:
    """The config of a released size; `text` and `vision` override fields of the two towers."""
    if size not in SIZES:
        raise ValueError(f"unknown Qwen3-VL size {size!r}, expected one of {list(SIZES)}")
    names = ("width", "depth", "num_heads", "num_kv_heads", "mlp_dim")
    names += ("num_experts", "experts_per_token", "expert_dim", "tie_embeddings")
    fields: dict[str, Any] = (
        dict(zip(names, SIZES[size], strict=True)) | QWEN3 | {"head_dim": 128, "vocab_size": 151936}
    )
    tower: dict[str, Any] = LARGE if size in ("2B", "4B") else {}
    return QwenVLConfig(
        text=TextConfig(**(fields | (text or {}))),
        vision=DeepStackConfig(**{"out_width": fields["width"], **tower, **(vision or {})}),
    )


# How the parameters add up, with the rows of the user's notes on 235B-A22B: they overlap, and leave parts out.
SUMS = {
    'encoder with all its mergers (notes: "ViT", 576.39 M)': "visual/.*",
    "    without the mergers": "visual/(?!.*merger).*",
    'its mergers, inside the first row (notes: "merger", 160.50 M)': "visual/.*merger.*",
    'decoder layers and final norm, no embedding (notes: "LM without lm_head", 233.85 B)': "language/(decoder|norm)/.*",
    "embedding": "language/embed_tokens/.*",
    'head, of the size of the embedding (notes: "lm_head", 622.33 M)': "language/lm_head/.*",
    'language model with embedding and head, no encoder (notes: "total", 235.09 B)': "language/.*",
    "everything": ".*",
}


def published(size: str) -> Published:
    """A released size; a forward pass is of one picture of 512 x 512 pixels among 64 tokens of text."""
    c = config(size)
    patches = (512 // c.vision.patch_size) ** 2
    return Published(
        build=lambda scan: QwenVL(config(size, text={"scan": scan}, vision={"scan": scan})),
        inputs=picture_and_text(c, patches, grid_sizes=integers(1, patches, 2)),
        checkpoint=f"Qwen/Qwen3-VL-{size}-Instruct, Qwen/Qwen3-VL-{size}-Thinking",
        sums=SUMS if size == "235B-A22B" else {},
    )


PUBLISHED = {size: published(size) for size in SIZES}
