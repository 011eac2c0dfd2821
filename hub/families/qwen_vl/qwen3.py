"""The published formats of Qwen3-VL, dense and with experts: tensors and configuration, both ways.

Three layouts of the experts' kernels are a format each: that of the releases (input axis before output), that of models
that transformers 5 made (output before input), and a tensor for every expert, as the text models have them.
"""

from collections.abc import Mapping
from typing import Any

from ....models.qwen_vl.deepstack import DeepStackConfig
from ....models.qwen_vl.language import TextConfig
from ....models.qwen_vl.model import QwenVLConfig
from ...files.tensors import TensorFile
from ...keys import Section, brief, equal, harmless, nested, only, used
from ...mapping import Row, Table
from ...rows import dense, merge_heads, norm, packed_heads
from ..transformers_keys import COMMON, HIDDEN_ACT
from .formats import (
    ROPE_KEYS,
    ROPE_PLACES,
    TEXT_BLOCK,
    VISION_BLOCK,
    VISION_ROPE,
    patch_row,
    rope_json,
    scaling_of,
    text_fields,
    text_json,
    text_rows,
    tower_fields,
    tower_json,
)

RELEASED, FIVE, SPLIT = "transformers", "transformers 5", "transformers, an expert a tensor"
FORMATS = (RELEASED, FIVE, SPLIT)
DENSE, EXPERTS = "qwen3_vl", "qwen3_vl_moe"
_PREFIX = "model.language_model"


def table(config: QwenVLConfig, format: str) -> Table:
    """Rows under the names of the releases."""
    assert isinstance(config.vision, DeepStackConfig)
    return Table(
        rows=[*_vision_rows(config.vision), *text_rows(_PREFIX), *_expert_rows(format)],
        renames=[
            (r"^visual\.", "model.visual."),
            (r"^model\.(?!visual|language_model)", f"{_PREFIX}."),
            (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", f"{_PREFIX}."),
            (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
        ],
        # Buffers; a head beside tied embeddings is their copy.
        ignore=[r".*\.inv_freq", *([r"lm_head\.weight"] if config.text.tie_embeddings else [])],
    )


def _vision_rows(config: DeepStackConfig) -> list[Row]:
    block, mergers = "model.visual.blocks.{i}", "model.visual.deepstack_merger_list.{j}"
    parts = (("linear_fc1", "fc1"), ("linear_fc2", "fc2"))
    return [
        patch_row(config, "model.visual"),
        Row("model.visual.patch_embed.proj.bias", "visual/patch_embed/bias"),
        Row("model.visual.pos_embed.weight", "visual/pos_embed"),
        *norm(f"{block}.norm1", f"{VISION_BLOCK}/norm1"),
        *packed_heads(f"{block}.attn.qkv", f"{VISION_BLOCK}/attn"),
        *merge_heads(f"{block}.attn.proj", f"{VISION_BLOCK}/attn/out"),
        *norm(f"{block}.norm2", f"{VISION_BLOCK}/norm2"),
        *(row for theirs, ours in parts for row in dense(f"{block}.mlp.{theirs}", f"{VISION_BLOCK}/mlp/{ours}")),
        *norm("model.visual.merger.norm", "visual/merger/norm"),
        *(row for theirs, ours in parts for row in dense(f"model.visual.merger.{theirs}", f"visual/merger/{ours}")),
        *norm(f"{mergers}.norm", "visual/deepstack_merger_{j}/norm"),
        *(
            row
            for theirs, ours in parts
            for row in dense(f"{mergers}.{theirs}", f"visual/deepstack_merger_{{j}}/{ours}")
        ),
    ]


def _expert_rows(format: str) -> list[Row]:
    mlp, block = f"{_PREFIX}.layers.{{i}}.mlp", f"{TEXT_BLOCK}/mlp"
    router = Row(f"{mlp}.gate.weight", f"{block}/router/kernel", "E D -> D E")
    both = (f"{block}/gate", f"{block}/up")
    if format == SPLIT:
        one = f"{mlp}.experts.{{e}}"
        split = [Row(f"{one}.{x}_proj.weight", f"{block}/{x}", "F D -> D F") for x in ("gate", "up", "down")]
        return [router, *split]
    released = format == RELEASED
    swap = "" if released else "E F D -> E D F"
    return [
        router,
        Row(f"{mlp}.experts.gate_up_proj", both, swap, axis=2 if released else 1),
        Row(f"{mlp}.experts.down_proj", f"{block}/down", swap),
    ]


def layout(tensors: TensorFile, width: int | None) -> str:
    """Which of the formats a file is in, from its first fused tensor [E, D, 2F] or [E, 2F, D]; D is the width.

    Where both axes have it, it is that of transformers 5, as transformers itself takes it.
    """
    if any(".mlp.experts.0." in name for name in tensors):
        return SPLIT
    fused = next((tensors.shape(name) for name in tensors if name.endswith("mlp.experts.gate_up_proj")), None)
    return FIVE if fused is not None and len(fused) == 3 and fused[2] == width else RELEASED


ROPE = Section(
    {
        **ROPE_KEYS,
        "mrope_section": used("integers", (24, 20, 20)),
        "mrope_interleaved": only(True),  # transformers interleaves whatever it says
    },
    "rope_parameters",
)
_TEXT = {
    **COMMON,
    "vocab_size": used("count", 151936),
    "hidden_act": used("text", "silu", choices=HIDDEN_ACT),
    "max_position_embeddings": used("count", 128000),
    "rms_norm_eps": used("number", 1e-6),
    "attention_bias": used("flag", False),
    "sliding_window": only(None),
    "rope_theta": used("positive", None),
    "rope_scaling": nested(ROPE),
    "rope_parameters": nested(ROPE),
}
# transformers' Qwen3VLTextConfig, Qwen3VLMoeTextConfig, Qwen3VL(Moe)VisionConfig and Qwen3VL(Moe)Config.
TEXT = Section(
    {
        **_TEXT,
        "hidden_size": used("count", 4096),
        "intermediate_size": used("count", 22016),
        "num_hidden_layers": used("count", 32),
        "num_attention_heads": used("count", 32),
        "num_key_value_heads": used("count", 32, null=True),
        "head_dim": used("count", 128),
    },
    "text_config",
)
TEXT_EXPERTS = Section(
    {
        **_TEXT,
        "hidden_size": used("count", 2048),
        "intermediate_size": used("count", 5632),
        "num_hidden_layers": used("count", 24),
        "num_attention_heads": used("count", 16),
        "num_key_value_heads": used("count", 16, null=True),
        "head_dim": used("count", None),
        "moe_intermediate_size": used("count", 1408),
        "num_experts_per_tok": used("count", 4),
        "num_experts": used("count", 60),
        "num_local_experts": used("count", None),  # the word of transformers 5 for it
        "decoder_sparse_step": only(1),
        "mlp_only_layers": only([], None),
        "norm_topk_prob": only(True),  # transformers divides by the sum whatever it says
        "router_aux_loss_coef": harmless("training"),
        "output_router_logits": harmless("outputs"),
    },
    "text_config",
)
VISION = Section(
    {
        **COMMON,
        "depth": used("count", 27),
        "hidden_size": used("count", 1152),
        "hidden_act": used("text", "gelu_pytorch_tanh", choices=HIDDEN_ACT),
        "intermediate_size": used("count", 4304),
        "num_heads": used("count", 16),
        "in_channels": used("count", 3),
        "patch_size": used("count", 16),
        "spatial_merge_size": used("count", 2),
        "temporal_patch_size": used("count", 2),
        "out_hidden_size": used("count", 3584),
        "num_position_embeddings": used("count", 2304),
        "deepstack_visual_indexes": used("integers", (8, 16, 24)),
        "rope_theta": only(10000.0),
        "rope_parameters": nested(VISION_ROPE),
    },
    "vision_config",
)
_ROOT = {
    **COMMON,
    "vision_config": nested(VISION),
    "image_token_id": used("whole", 151655),
    "video_token_id": used("whole", 151656),
    "tie_word_embeddings": used("flag", False),
    **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), harmless("tokens")),
}
ROOT = Section({**_ROOT, "text_config": nested(TEXT)})
ROOT_EXPERTS = Section({**_ROOT, "text_config": nested(TEXT_EXPERTS)})


def config_from_json(published: Mapping[str, Any], where: str = "config.json") -> QwenVLConfig:
    """Reads config.json of the releases and of transformers 5; the embeddings are tied if the root says so."""
    with_experts = published.get("model_type") == EXPERTS
    root = (ROOT_EXPERTS if with_experts else ROOT).read(published, where)
    given = published.get("text_config") or {}
    vision = root["vision_config"]
    return QwenVLConfig(
        text=_text_config(root["text_config"], given, with_experts, root["tie_word_embeddings"], where),
        vision=DeepStackConfig(
            **tower_fields(vision),
            num_positions=vision["num_position_embeddings"],
            deepstack_blocks=tuple(vision["deepstack_visual_indexes"]),
        ),
        image_token=root["image_token_id"],
        video_token=root["video_token_id"],
    )


def _text_config(
    c: Mapping[str, Any], given: Mapping[str, Any], with_experts: bool, tied: bool, where: str
) -> TextConfig:
    rope = c["rope_scaling"] if given.get(ROPE_PLACES[0]) else c["rope_parameters"]
    width, heads = c["hidden_size"], c["num_attention_heads"]
    if c["head_dim"] is None and width % heads:
        raise ValueError(f"{where}: 'hidden_size' is {width}, expected a multiple of 'num_attention_heads' {heads}")
    experts: dict[str, Any] = {}
    if with_experts:
        number = c["num_local_experts"] or c["num_experts"]
        if "num_experts" in given and not equal(c["num_experts"], number):
            raise ValueError(f"{where}: 'num_experts' is {brief(c['num_experts'])}, 'num_local_experts' {number}")
        experts |= {"num_experts": number, "experts_per_token": c["num_experts_per_tok"]}
        experts |= {"expert_dim": c["moe_intermediate_size"]}
    return TextConfig(
        **text_fields(c),
        **experts,
        head_dim=c["head_dim"] or width // heads,
        tie_embeddings=tied,
        qkv_bias=c["attention_bias"],
        out_bias=c["attention_bias"],
        qk_norm=True,
        rope_theta=rope["rope_theta"] or c["rope_theta"] or 5e5,
        rope_scaling=scaling_of(rope, c["max_position_embeddings"], where),
        mrope_section=tuple(rope["mrope_section"]),
        mrope_interleaved=True,
    )


def config_to_json(config: QwenVLConfig) -> dict[str, Any]:
    """The config.json of a release."""
    text, vision = config.text, config.vision
    assert isinstance(vision, DeepStackConfig)
    kind = EXPERTS if text.num_experts else DENSE
    experts = {
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.experts_per_token,
        "moe_intermediate_size": text.expert_dim,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {
        "architectures": [f"Qwen3VL{'Moe' if text.num_experts else ''}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": text.tie_embeddings,
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "text_config": {
            "model_type": f"{kind}_text",
            **text_json(text),
            "head_dim": text.head_dim,
            "attention_bias": text.qkv_bias,
            "rope_scaling": {"mrope_interleaved": True} | rope_json(text),
            **(experts if text.num_experts else {}),
        },
        "vision_config": {
            "model_type": kind,
            **tower_json(vision),
            "num_position_embeddings": vision.num_positions,
            "deepstack_visual_indexes": list(vision.deepstack_blocks),
        },
    }
