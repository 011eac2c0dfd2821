"""The tensors of ViT weights in the three published formats.

transformers (`ViTForImageClassification`, `ViTModel`; the names on disk and those of v5 in memory), timm, and Google's
.npz of both generations (google-research/vision_transformer: "old", google-research/big_vision: "new").
"""

from dataclasses import replace

from ....models.vit import ViTConfig
from ...mapping import Row, Table
from ...rows import QKV, conv, dense, heads, merge_heads, norm, packed_heads

_BLOCK = "encoder/blocks_{i}"

# Names in files of any era -> those of `ViTModel` on disk.
TRANSFORMERS_RENAMES = [
    (r"^vit\.", ""),
    (r"^layers\.", "encoder.layer."),  # from here on: transformers v5 in memory
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
# Prefixes, and where the positions and the attention head stood over the years -> big_vision's of today.
NPZ_RENAMES = [
    (r"^(opt/target|params/img|params)/", ""),
    (r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding"),
    (r"^(probe$|(MultiHeadDotProductAttention|LayerNorm|MlpBlock)_\d+/)", r"MAPHead_0/\1"),
    (r"^MAPHead_0/([A-Za-z]+)_\d+/", r"MAPHead_0/\1_0/"),
]


def transformers_table(config: ViTConfig) -> Table:
    layer = "encoder.layer.{i}"
    rows = [
        Row("embeddings.cls_token", "embed/cls_token"),
        Row("embeddings.position_embeddings", "embed/pos_embed"),
        *conv("embeddings.patch_embeddings.projection", "patch_embed"),
        *norm(f"{layer}.layernorm_before", f"{_BLOCK}/norm1"),
        *(row for name in QKV for row in heads(f"{layer}.attention.attention.{name}", f"{_BLOCK}/attn/{name}")),
        *merge_heads(f"{layer}.attention.output.dense", f"{_BLOCK}/attn/out"),
        *norm(f"{layer}.layernorm_after", f"{_BLOCK}/norm2"),
        *dense(f"{layer}.intermediate.dense", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{layer}.output.dense", f"{_BLOCK}/mlp/fc2"),
        *norm("layernorm", "norm"),
    ]
    if not config.num_classes:
        return Table([*rows, *dense("pooler.dense", "pre_logits")], TRANSFORMERS_RENAMES)
    # ViTForImageClassification reads the class token itself; a pooler left in its file is never run.
    rows = [*(replace(row, source=f"vit.{row.source}") for row in rows), *dense("classifier", "head")]
    return Table(rows, [*TRANSFORMERS_RENAMES, (r"^(?!classifier\.)", "vit.")], [r"vit\.pooler\..*"])


def timm_table(config: ViTConfig) -> Table:
    """VisionTransformer, VisionTransformerDistilled, and Eva with the attention of a ViT: with rotary positions."""
    block, attn = "blocks.{i}", f"{_BLOCK}/attn"
    # The class VisionTransformer's names, and Eva's (also those of DeiT III's own files); saving writes the first.
    scales = [
        Row(f"{block}.{name}", f"{_BLOCK}/scale{n}/gamma")
        for n in (1, 2)
        for name in ((f"gamma_{n}", f"ls{n}.gamma") if config.rope else (f"ls{n}.gamma", f"gamma_{n}"))
    ]
    rows = [
        Row("cls_token", "embed/cls_token"),
        Row("dist_token", "embed/dist_token"),
        Row("reg_token", "embed/register_tokens"),
        Row("pos_embed", "embed/pos_embed"),
        *conv("patch_embed.proj", "patch_embed"),
        *norm("norm_pre", "pre_norm"),
        *norm(f"{block}.norm1", f"{_BLOCK}/norm1"),
        *packed_heads(f"{block}.attn.qkv", attn),
        *(row for name in QKV for row in heads(f"{block}.attn.{name[0]}_proj", f"{attn}/{name}")),
        *norm(f"{block}.attn.q_norm", f"{attn}/q_norm"),
        *norm(f"{block}.attn.k_norm", f"{attn}/k_norm"),
        *merge_heads(f"{block}.attn.proj", f"{attn}/out"),
        *scales,
        *norm(f"{block}.norm2", f"{_BLOCK}/norm2"),
        *packed_gate(f"{block}.mlp.fc1", f"{_BLOCK}/mlp"),
        *dense(f"{block}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{block}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
        *norm("norm", "norm"),
        *norm("fc_norm", "fc_norm"),
        *attention_pool(),
        *dense("head", "head"),
        *dense("head_dist", "head_dist"),
    ]
    # timm dropped the representation layer, which its older files still hold.
    return Table(rows, ignore=[r"pre_logits\..*"])


def attention_pool() -> tuple[Row, ...]:
    """timm's AttentionPoolLatent."""
    return (
        Row("attn_pool.latent", "map_head/probe"),
        *heads("attn_pool.q", "map_head/attn/query"),
        *packed_heads("attn_pool.kv", "map_head/attn", ("key", "value")),
        *merge_heads("attn_pool.proj", "map_head/attn/out"),
        *norm("attn_pool.norm", "map_head/norm"),
        *dense("attn_pool.mlp.fc1", "map_head/mlp/fc1"),
        *dense("attn_pool.mlp.fc2", "map_head/mlp/fc2"),
    )


def packed_gate(source: str, target: str) -> tuple[Row, Row]:
    """The gate and the first layer of a gated MLP in one Linear."""
    names = ("gate", "fc1")
    return (
        Row(f"{source}.weight", tuple(f"{target}/{name}/kernel" for name in names), "F D -> D F"),
        Row(f"{source}.bias", tuple(f"{target}/{name}/bias" for name in names)),
    )


def npz_table(generation: str) -> Table:
    """`generation`: "old" numbers the modules of a block on from 0 to 3, "new" each kind of module by itself."""
    attention, norm2, mlp = (1, 2, 3) if generation == "old" else (0, 1, 0)
    position = "Transformer/posembed_input/pos_embedding" if generation == "old" else "pos_embedding"
    block = "Transformer/encoderblock_{i}"
    layers = [
        *_same(f"{block}/LayerNorm_0", f"{_BLOCK}/norm1", "scale", "bias"),
        *_flax_attention(f"{block}/MultiHeadDotProductAttention_{attention}", f"{_BLOCK}/attn"),
        *_same(f"{block}/LayerNorm_{norm2}", f"{_BLOCK}/norm2", "scale", "bias"),
        *_flax_mlp(f"{block}/MlpBlock_{mlp}", f"{_BLOCK}/mlp"),
    ]
    scanned = [replace(row, source=row.source.replace("_{i}", "")) for row in layers]
    rows = [
        *_same("embedding", "patch_embed", "kernel", "bias"),
        Row("cls", "embed/cls_token"),
        Row(position, "embed/pos_embed"),
        *layers,
        *scanned,
        *_same("Transformer/encoder_norm", "norm", "scale", "bias"),
        Row("MAPHead_0/probe", "map_head/probe"),
        *_flax_attention("MAPHead_0/MultiHeadDotProductAttention_0", "map_head/attn"),
        *_same("MAPHead_0/LayerNorm_0", "map_head/norm", "scale", "bias"),
        *_flax_mlp("MAPHead_0/MlpBlock_0", "map_head/mlp"),
        *_same("pre_logits", "pre_logits", "kernel", "bias"),
        *_same("head", "head", "kernel", "bias"),
    ]
    renames = [*NPZ_RENAMES, (r"^pos_embedding$", position)]
    # Optimiser state, and the text tower, temperature and bias of image-text models (big_vision two_towers).
    return Table(rows, renames, [r"(opt|txt)/.*", "[tb]"])


def _same(source: str, target: str, *names: str) -> list[Row]:
    return [Row(f"{source}/{name}", f"{target}/{name}") for name in names]


def _flax_attention(source: str, target: str) -> list[Row]:
    return [row for x in (*QKV, "out") for row in _same(f"{source}/{x}", f"{target}/{x}", "kernel", "bias")]


def _flax_mlp(source: str, target: str) -> list[Row]:
    return [row for i in (0, 1) for row in _same(f"{source}/Dense_{i}", f"{target}/fc{i + 1}", "kernel", "bias")]
