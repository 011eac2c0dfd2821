"""The published format of Qwen2.5-VL: its table of tensors (every prefix era) and its configuration, both ways."""

from collections.abc import Mapping
from typing import Any

from ....models.qwen_vl.language import TextConfig
from ....models.qwen_vl.model import QwenVLConfig
from ....models.qwen_vl.vision import VisionConfig
from ...mapping import Row, Table
from ...rows import QKV, dense, heads, merge_heads, packed_heads

_VISION = "visual/encoder/blocks_{i}"
_TEXT = "language/decoder/blocks_{i}"


def table(config: QwenVLConfig) -> Table:
    """Rows under the names of all releases; the other eras' prefixes are renamed to them."""
    return Table(
        rows=[*_vision_rows(config.vision), *_text_rows(config.text)],
        renames=[
            (r"^(model\.)?visual\.", "visual."),  # in memory since transformers 4.52, and in fine-tunes saved from it
            (r"^(model\.)?language_model\.(model\.)?", "model."),
            (r"^model\.lm_head\.", "lm_head."),
        ],
        # Buffers of early files; a head beside tied embeddings is their copy.
        ignore=[r".*\.inv_freq", *([r"lm_head\.weight"] if config.text.tie_embeddings else [])],
    )


def _vision_rows(config: VisionConfig) -> list[Row]:
    block = "visual.blocks.{i}"
    patch = {"c": config.num_channels, "t": config.temporal_patch_size, "y": config.patch_size, "x": config.patch_size}
    return [
        Row("visual.patch_embed.proj.weight", "visual/patch_embed/kernel", "D c t y x -> (c t y x) D", sizes=patch),
        Row("visual.global_query", "visual/global_query"),
        Row(f"{block}.norm1.weight", f"{_VISION}/norm1/scale"),
        *packed_heads(f"{block}.attn.qkv", f"{_VISION}/attn"),
        *merge_heads(f"{block}.attn.proj", f"{_VISION}/attn/out"),
        Row(f"{block}.norm2.weight", f"{_VISION}/norm2/scale"),
        *dense(f"{block}.mlp.gate_proj", f"{_VISION}/mlp/gate"),
        *dense(f"{block}.mlp.up_proj", f"{_VISION}/mlp/fc1"),
        *dense(f"{block}.mlp.down_proj", f"{_VISION}/mlp/fc2"),
        Row("visual.merger.ln_q.weight", "visual/merger_norm/scale"),
        *dense("visual.merger.mlp.0", "visual/merger_fc1"),
        *dense("visual.merger.mlp.2", "visual/merger_fc2"),
    ]


def _text_rows(config: TextConfig) -> list[Row]:
    layer = "model.layers.{i}"
    return [
        Row("model.embed_tokens.weight", "language/embed_tokens/embedding"),
        Row(f"{layer}.input_layernorm.weight", f"{_TEXT}/norm1/scale"),
        *(row for name in QKV for row in heads(f"{layer}.self_attn.{name[0]}_proj", f"{_TEXT}/attn/{name}")),
        *merge_heads(f"{layer}.self_attn.o_proj", f"{_TEXT}/attn/out"),
        Row(f"{layer}.post_attention_layernorm.weight", f"{_TEXT}/norm2/scale"),
        *dense(f"{layer}.mlp.gate_proj", f"{_TEXT}/mlp/gate"),
        *dense(f"{layer}.mlp.up_proj", f"{_TEXT}/mlp/fc1"),
        *dense(f"{layer}.mlp.down_proj", f"{_TEXT}/mlp/fc2"),
        Row("model.norm.weight", "language/norm/scale"),
        *dense("lm_head", "language/lm_head"),
    ]


def config_from_json(published: Mapping[str, Any]) -> QwenVLConfig:
    """Reads config.json of the hub's releases (text fields at the root) and of transformers v5 (nested)."""
    text = {**published, **published.get("text_config", {})}
    vision = published.get("vision_config", {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    heads = _need(text, "num_attention_heads")
    width = _need(text, "hidden_size")
    patch = vision.get("patch_size", vision.get("spatial_patch_size", 14))
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=_need(text, "vocab_size"),
            width=width,
            depth=_need(text, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads", heads),
            head_dim=text.get("head_dim") or width // heads,
            mlp_dim=_need(text, "intermediate_size"),
            # The root flag governs: the text section of some releases says the opposite.
            tie_embeddings=published.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            rope_theta=text.get("rope_theta") or rope.get("rope_theta", 1e6),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            eps=text.get("rms_norm_eps", 1e-6),
        ),
        vision=VisionConfig(
            depth=_need(vision, "depth"),
            width=_need(vision, "hidden_size"),
            num_heads=_need(vision, "num_heads"),
            mlp_dim=_need(vision, "intermediate_size"),
            out_width=vision.get("out_hidden_size", width),
            patch_size=patch,
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            merge_size=vision.get("spatial_merge_size", 2),
            num_channels=vision.get("in_channels", vision.get("in_chans", 3)),
            window=vision.get("window_size", 112) // patch,
            full_blocks=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
            shifted=vision.get("shifted_windows", False),
            global_query_every=vision.get("global_query_every", 0),
            global_query_carry=vision.get("global_query_carry", False),
        ),
        image_token=published.get("image_token_id", 151655),
        video_token=published.get("video_token_id", 151656),
        tokens_per_second=vision.get("tokens_per_second", 2),
    )


def _need(section: Mapping[str, Any], key: str) -> Any:
    if key not in section:
        raise ValueError(f"config.json has no {key!r}")
    return section[key]


def config_to_json(config: QwenVLConfig) -> dict[str, Any]:
    """The config.json of a release: text fields at the root; fields of the notes' encoder where they are set."""
    text, vision = config.text, config.vision
    notes = {
        "shifted_windows": vision.shifted,
        "global_query_every": vision.global_query_every,
        "global_query_carry": vision.global_query_carry,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "intermediate_size": text.mlp_dim,
        "tie_word_embeddings": text.tie_embeddings,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "rms_norm_eps": text.eps,
        "hidden_act": "silu",
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision.depth,
            "hidden_size": vision.width,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.mlp_dim,
            "out_hidden_size": vision.out_width,
            "patch_size": vision.patch_size,
            "spatial_patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "in_chans": vision.num_channels,
            "window_size": vision.window * vision.patch_size,
            "fullatt_block_indexes": list(vision.full_blocks),
            "tokens_per_second": config.tokens_per_second,
            "hidden_act": "silu",
            **{name: value for name, value in notes.items() if value},
        },
    }
