"""The published format of Qwen2.5-VL: its table of tensors (every prefix era) and its configuration, both ways.

What Qwen3-VL shares with it (qwen3.py) has no underscore.
"""

import math
from collections.abc import Mapping
from typing import Any

from ....kernels.rope import LinearScaling, Scaling, YarnScaling
from ....models.qwen_vl.deepstack import DeepStackConfig
from ....models.qwen_vl.language import TextConfig
from ....models.qwen_vl.model import QwenVLConfig
from ....models.qwen_vl.vision import VisionConfig
from ...keys import Section, brief, harmless, nested, only, repeats, used
from ...mapping import Row, Table
from ...rows import QKV, dense, heads, merge_heads, packed_heads
from ..transformers_keys import COMMON, HIDDEN_ACT

VISION_BLOCK = "visual/encoder/blocks_{i}"
TEXT_BLOCK = "language/decoder/blocks_{i}"


def table(config: QwenVLConfig) -> Table:
    """Rows under the names of all releases; the other eras' prefixes are renamed to them."""
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    return Table(
        rows=[*_vision_rows(vision), *text_rows("model")],
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
    return [
        patch_row(config, "visual"),
        Row("visual.global_query", "visual/global_query"),
        Row(f"{block}.norm1.weight", f"{VISION_BLOCK}/norm1/scale"),
        *packed_heads(f"{block}.attn.qkv", f"{VISION_BLOCK}/attn"),
        *merge_heads(f"{block}.attn.proj", f"{VISION_BLOCK}/attn/out"),
        Row(f"{block}.norm2.weight", f"{VISION_BLOCK}/norm2/scale"),
        *dense(f"{block}.mlp.gate_proj", f"{VISION_BLOCK}/mlp/gate"),
        *dense(f"{block}.mlp.up_proj", f"{VISION_BLOCK}/mlp/fc1"),
        *dense(f"{block}.mlp.down_proj", f"{VISION_BLOCK}/mlp/fc2"),
        Row("visual.merger.ln_q.weight", "visual/merger_norm/scale"),
        *dense("visual.merger.mlp.0", "visual/merger_fc1"),
        *dense("visual.merger.mlp.2", "visual/merger_fc2"),
    ]


def text_rows(prefix: str) -> list[Row]:
    """Of both generations' language models, whose dense MLPs and biases are there or not."""
    layer, block = f"{prefix}.layers.{{i}}", TEXT_BLOCK
    return [
        Row(f"{prefix}.embed_tokens.weight", "language/embed_tokens/embedding"),
        Row(f"{layer}.input_layernorm.weight", f"{block}/norm1/scale"),
        *(row for name in QKV for row in heads(f"{layer}.self_attn.{name[0]}_proj", f"{block}/attn/{name}")),
        *(Row(f"{layer}.self_attn.{x[0]}_norm.weight", f"{block}/attn/{x}_norm/scale") for x in ("query", "key")),
        *merge_heads(f"{layer}.self_attn.o_proj", f"{block}/attn/out"),
        Row(f"{layer}.post_attention_layernorm.weight", f"{block}/norm2/scale"),
        *dense(f"{layer}.mlp.gate_proj", f"{block}/mlp/gate"),
        *dense(f"{layer}.mlp.up_proj", f"{block}/mlp/fc1"),
        *dense(f"{layer}.mlp.down_proj", f"{block}/mlp/fc2"),
        Row(f"{prefix}.norm.weight", "language/norm/scale"),
        *dense("lm_head", "language/lm_head"),
    ]


def patch_row(config: VisionConfig | DeepStackConfig, prefix: str) -> Row:
    """The kernel of the patches, a convolution's."""
    sizes = {"c": config.num_channels, "t": config.temporal_patch_size, "y": config.patch_size, "x": config.patch_size}
    name = f"{prefix}.patch_embed.proj.weight"
    return Row(name, "visual/patch_embed/kernel", "D c t y x -> (c t y x) D", sizes=sizes)


_TOKENS = ("vision_start_token_id", "vision_end_token_id", "vision_token_id")
ROPE_KEYS = {
    # "mrope" is the word of the first releases for "default"; `rope_type` wins over `type`.
    "rope_type": used("text", None, choices=("default", "mrope", "linear", "yarn")),
    "type": used("text", None, choices=("default", "mrope", "linear", "yarn")),
    "rope_theta": used("positive", None),
    "mrope_section": used("integers", (16, 24, 24)),
    "factor": used("positive", None),
    "original_max_position_embeddings": used("count", None),
    "attention_factor": used("positive", None),
    "beta_fast": used("positive", None),
    "beta_slow": used("positive", None),
    "mscale": used("number", None),
    "mscale_all_dim": used("number", None),
    "truncate": used("flag", True),
    "partial_rotary_factor": only(1.0),
}
ROPE = Section({**ROPE_KEYS, "mrope_interleaved": only(False)}, "rope_parameters")
VISION_ROPE = Section(
    {
        "rope_type": only("axial", "default"),
        "type": only("axial", "default"),
        "rope_theta": only(10000.0),
        "partial_rotary_factor": only(1.0, None),
    },
    "rope_parameters",
)
# transformers' Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig and Qwen2_5_VLConfig.
TEXT = Section(
    {
        **COMMON,
        "vocab_size": used("count", 152064),
        "hidden_size": used("count", 8192),
        "intermediate_size": used("count", 29568),
        "num_hidden_layers": used("count", 80),
        "num_attention_heads": used("count", 64),
        "num_key_value_heads": used("count", 8, null=True),
        "head_dim": used("count", None),  # no field of the class, but its rotary embedding reads it
        "hidden_act": used("text", "silu", choices=HIDDEN_ACT),
        "max_position_embeddings": used("count", 32768),
        "rms_norm_eps": used("number", 1e-5),
        "use_sliding_window": used("flag", False, null=True),
        "sliding_window": used("count", 4096, null=True),
        "max_window_layers": used("whole", 80, null=True),
        "layer_types": used("texts", None),
        "rope_theta": used("positive", None),
        "rope_scaling": nested(ROPE),
        "rope_parameters": nested(ROPE),
        "tie_word_embeddings": used("flag", False),
        **dict.fromkeys((*_TOKENS, "image_token_id", "video_token_id"), harmless("tokens")),
    },
    "text_config",
)
VISION = Section(
    {
        **COMMON,
        "depth": used("count", 32),
        "hidden_size": used("count", 3584),
        "hidden_act": used("text", "silu", choices=HIDDEN_ACT),
        "intermediate_size": used("count", 3420),
        "num_heads": used("count", 16),
        "in_channels": used("count", 3),
        "patch_size": used("count", 14),
        "spatial_merge_size": used("count", 2),
        "temporal_patch_size": used("count", 2),
        "tokens_per_second": used("count", 4),
        "window_size": used("count", 112),
        "out_hidden_size": used("count", 3584),
        "fullatt_block_indexes": used("integers", (7, 15, 23, 31)),
        "rope_theta": only(10000.0),
        "rope_scaling": nested(VISION_ROPE),
        "rope_parameters": nested(VISION_ROPE),
        # Further words of the releases and of transformers, for what they have named already.
        "in_chans": repeats("in_channels"),
        "spatial_patch_size": repeats("patch_size"),
        "num_attention_heads": repeats("num_heads"),
        "num_hidden_layers": repeats("depth"),
        # The encoder of the user's notes (`NOTES_VISION`), which no release has.
        "shifted_windows": used("flag", False),
        "global_query_every": used("whole", 0),
        "global_query_carry": used("flag", False),
    },
    "vision_config",
)
_ROOT = {
    "vision_config": nested(VISION),
    "image_token_id": used("whole", 151655),
    "video_token_id": used("whole", 151656),
    "tie_word_embeddings": used("flag", False),
    **dict.fromkeys(_TOKENS, harmless("tokens")),
}
NESTED = Section({**dict.fromkeys(TEXT.keys, harmless("ignored")), **COMMON, **_ROOT, "text_config": nested(TEXT)})
FLAT = Section({**TEXT.keys, **_ROOT, "text_config": only(None)})


def config_from_json(published: Mapping[str, Any], where: str = "config.json") -> QwenVLConfig:
    """Reads config.json of the hub's releases (text fields at the root) and of transformers v5 (nested)."""
    flat = published.get("text_config") is None
    root = (FLAT if flat else NESTED).read(published, where)
    text, vision = root if flat else root["text_config"], root["vision_config"]
    sections = {key: (published if flat else published["text_config"]).get(key) for key in ROPE_PLACES}
    notes = vision["shifted_windows"] or vision["global_query_every"]
    # transformers measures windows in merged patches, and rounds down twice.
    merge = 1 if notes else vision["spatial_merge_size"]
    window = vision["window_size"] // merge // vision["patch_size"] * merge
    if not window:
        raise ValueError(f"{where}: 'window_size' is {vision['window_size']}, expected {merge} patches or more")
    return QwenVLConfig(
        text=_text_config(text, sections, root["tie_word_embeddings"] or text["tie_word_embeddings"], where),
        vision=VisionConfig(
            **tower_fields(vision),
            window=window,
            full_blocks=tuple(vision["fullatt_block_indexes"]),
            shifted=vision["shifted_windows"],
            global_query_every=vision["global_query_every"],
            global_query_carry=vision["global_query_carry"],
        ),
        image_token=root["image_token_id"],
        video_token=root["video_token_id"],
        tokens_per_second=vision["tokens_per_second"],
    )


ROPE_PLACES = ("rope_scaling", "rope_parameters")


def _text_config(c: Mapping[str, Any], given: Mapping[str, Any], tied: bool, where: str) -> TextConfig:
    """`given`: the sections of rotary positions as the file has them; `rope_scaling` wins where it says anything."""
    width, heads, depth = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    sliding = c["use_sliding_window"] and c["sliding_window"] is not None
    if c["layer_types"] is None and sliding and (c["max_window_layers"] or 0) < depth:
        raise ValueError(
            f"{where}: 'use_sliding_window' is True with 'max_window_layers' {c['max_window_layers']}, expected False, "
            f"or at least {depth}: attention in windows is not implemented"
        )
    if c["layer_types"] is not None and tuple(c["layer_types"]) != ("full_attention",) * depth:
        raise ValueError(f"{where}: 'layer_types' is {brief(c['layer_types'])}, expected {depth} of 'full_attention'")
    if width % heads or c["head_dim"] not in (None, width // heads):
        raise ValueError(f"{where}: 'head_dim' is {c['head_dim']}, expected {width} / {heads} channels")
    rope = c["rope_scaling"] if given["rope_scaling"] else c["rope_parameters"]
    return TextConfig(
        **text_fields(c),
        head_dim=width // heads,
        tie_embeddings=tied,
        rope_theta=rope["rope_theta"] or c["rope_theta"] or 1e6,
        rope_scaling=scaling_of(rope, c["max_position_embeddings"], where),
        mrope_section=tuple(rope["mrope_section"]),
    )


def text_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `text_json`, but for rotary positions."""
    heads = c["num_attention_heads"]
    return {
        "vocab_size": c["vocab_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads if c["num_key_value_heads"] is None else c["num_key_value_heads"],
        "mlp_dim": c["intermediate_size"],
        "activation": HIDDEN_ACT[c["hidden_act"]],
        "eps": c["rms_norm_eps"],
    }


def scaling_of(rope: Mapping[str, Any], length: int, where: str) -> Scaling | None:
    """transformers' `modeling_rope_utils.py`; `length` is what the model was made for."""
    kind = rope["rope_type"] or rope["type"] or "default"
    if kind in ("default", "mrope"):
        return None
    factor = rope["factor"]
    if factor is None:
        raise ValueError(f"{where}, rope_parameters: 'factor' is None, expected a number beside rope_type {kind!r}")
    if kind == "linear":
        return LinearScaling(factor)
    attention = rope["attention_factor"]
    if attention is None and rope["mscale"] and rope["mscale_all_dim"]:
        attention = _gain(factor, rope["mscale"]) / _gain(factor, rope["mscale_all_dim"])
    return YarnScaling(
        factor,
        rope["original_max_position_embeddings"] or length,
        beta_fast=rope["beta_fast"] or 32.0,
        beta_slow=rope["beta_slow"] or 1.0,
        truncate=rope["truncate"],
        attention_factor=attention,
    )


def _gain(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_json(text: TextConfig) -> dict[str, Any]:
    """The scaling of rotary positions and their sections, as transformers reads them."""
    scaling, section = text.rope_scaling, list(text.mrope_section)
    if scaling is None:
        return {"rope_type": "default", "mrope_section": section}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor, "mrope_section": section}
    if not isinstance(scaling, YarnScaling):
        raise ValueError(f"Qwen-VL has no rotary scaling of {type(scaling).__name__}, expected linear or yarn")
    gain = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "mrope_section": section,
        **gain,
    }


def text_json(text: TextConfig) -> dict[str, Any]:
    """The fields of both generations' language models."""
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "intermediate_size": text.mlp_dim,
        "rope_theta": text.rope_theta,
        "rms_norm_eps": text.eps,
        "hidden_act": activation_name(text.activation),
    }


def tower_json(vision: VisionConfig | DeepStackConfig) -> dict[str, Any]:
    """The fields of both generations' encoders."""
    return {
        "depth": vision.depth,
        "hidden_size": vision.width,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.mlp_dim,
        "out_hidden_size": vision.out_width,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.merge_size,
        "in_channels": vision.num_channels,
        "hidden_act": activation_name(vision.activation),
    }


def tower_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, as fields of the config."""
    return {
        "depth": vision["depth"],
        "width": vision["hidden_size"],
        "num_heads": vision["num_heads"],
        "mlp_dim": vision["intermediate_size"],
        "out_width": vision["out_hidden_size"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "num_channels": vision["in_channels"],
        "activation": HIDDEN_ACT[vision["hidden_act"]],
    }


def activation_name(activation: str) -> str:
    """Our name of an activation in that of transformers."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


def config_to_json(config: QwenVLConfig) -> dict[str, Any]:
    """The config.json of a release: text fields at the root; fields of the notes' encoder where they are set."""
    text, vision = config.text, config.vision
    assert isinstance(vision, VisionConfig)
    notes = {
        "shifted_windows": vision.shifted,
        "global_query_every": vision.global_query_every,
        "global_query_carry": vision.global_query_carry,
    }
    rope = rope_json(text)
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **text_json(text),
        "tie_word_embeddings": text.tie_embeddings,
        # The word of the first releases for "default"
        "rope_scaling": {"type": "mrope"} | {"mrope_section": rope["mrope_section"]} if not text.rope_scaling else rope,
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            **tower_json(vision),
            "spatial_patch_size": vision.patch_size,
            "in_chans": vision.num_channels,
            "window_size": vision.window * vision.patch_size,
            "fullatt_block_indexes": list(vision.full_blocks),
            "tokens_per_second": config.tokens_per_second,
            **{name: value for name, value in notes.items() if value},
        },
    }
