"""The tensors of CLIP weights in the published formats.

transformers (`CLIPModel`, `SiglipModel` and their single towers), open_clip (with its own image tower, or one of timm's
under `visual.trunk.`; OpenAI's archives have the same names), and the EVA-CLIP repository's, which are renamed to
open_clip's.
"""

from dataclasses import replace

from ....models.clip import CLIPConfig, ImageConfig, TextConfig
from ....models.eva import EvaConfig
from ...mapping import Row, Table
from ...rows import QKV, conv, dense, heads, merge_heads, norm, packed_heads, under
from ..vit import formats as vit_formats

_BLOCK = "encoder/blocks_{i}"
Config = CLIPConfig | ImageConfig | TextConfig

# EVA-CLIP's names (EVA-CLIP/rei/eva_clip/eva_vit_model.py) -> those of timm's towers in open_clip.
EVA_RENAMES = [
    (r"^visual\.(?!trunk\.)", "visual.trunk."),
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
]
# Tables computed from the config that some files keep, and what OpenAI's archives say about themselves.
_BUFFERS = [r"(.*\.)?(attn_mask|position_ids|freqs_(cos|sin)|pos_embed_(cos|sin)|k_bias|relative_position_index)"]
_OPENAI_NOTES = ["input_resolution", "context_length", "vocab_size"]
_TEXT = r"(positional_embedding|text_projection|token_embedding|transformer|ln_final|attn_mask)"


def text_prefix(custom_text: bool) -> list[tuple[str, str]]:
    """Puts the text tower under `text.`, as open_clip's `custom_text` models have it, or takes it out from there."""
    return [(rf"^{_TEXT}", r"text.\1")] if custom_text else [(rf"^text\.{_TEXT}", r"\1")]


def open_clip_table(config: CLIPConfig, custom_text: bool, timm_trunk: bool) -> Table:
    """Both towers; `timm_trunk` where the image tower is timm's."""
    image = timm_trunk_rows(config.image) if timm_trunk else open_clip_image()
    rows = [
        *under(image, "visual.", "image/"),
        *under(_open_clip_text(config.text), "text." if custom_text else "", "text/"),
        *_scalars(),
    ]
    renames = [*(EVA_RENAMES if timm_trunk else []), *text_prefix(custom_text)]
    return Table(rows, renames, [*_BUFFERS, *_OPENAI_NOTES])


def timm_trunk_rows(config: ImageConfig) -> list[Row]:
    """An image tower of timm's within open_clip: an EVA or a ViT; its head, where it has one, projects."""
    trunk = eva_rows(config.trunk) if isinstance(config.trunk, EvaConfig) else vit_formats.timm_table(config.trunk).rows
    trunk = [row for row in trunk if not row.source.startswith(("head.", "head_dist."))]
    projection = [*dense("trunk.head", "projection"), *dense("head.proj", "projection")]
    return [*under(trunk, "trunk.", "trunk/"), *projection]


def eva_rows(config: EvaConfig) -> list[Row]:
    """timm's EVA trunks (timm/models/eva.py). Queries and values have biases of their own, keys none."""
    block = "blocks.{i}"
    attn = f"{_BLOCK}/attn"
    packed = [
        Row(f"{block}.attn.qkv.weight", tuple(f"{attn}/{name}/kernel" for name in QKV), "(N H) D -> D N H"),
        *(Row(f"{block}.attn.{x[0]}_bias", f"{attn}/{x}/bias", "(N H) -> N H") for x in ("query", "value")),
    ]
    separate = [row for name in QKV for row in heads(f"{block}.attn.{name[0]}_proj", f"{attn}/{name}")]
    # Alternatives, the published one first: it is what saving writes. EVA-CLIP's own files mix the two.
    projections = [*separate, *packed] if config.gated else [*packed, *separate]
    mlp: list[Row] = [*dense(f"{block}.mlp.fc1", f"{_BLOCK}/mlp/fc1")]
    if config.gated:  # in two layers, or packed into one where no norm follows
        two = [*dense(f"{block}.mlp.fc1_x", f"{_BLOCK}/mlp/fc1"), *dense(f"{block}.mlp.fc1_g", f"{_BLOCK}/mlp/gate")]
        packed_mlp = vit_formats.packed_gate(f"{block}.mlp.fc1", f"{_BLOCK}/mlp")
        mlp = [*two, *packed_mlp] if config.mlp_norm else [*packed_mlp, *two]
    return [
        Row("cls_token", "embed/cls_token"),
        Row("reg_token", "embed/register_tokens"),
        Row("pos_embed", "embed/pos_embed"),
        *conv("patch_embed.proj", "patch_embed"),
        *norm("norm_pre", "pre_norm"),
        *norm(f"{block}.norm1", f"{_BLOCK}/norm1"),
        *projections,
        *norm(f"{block}.attn.q_norm", f"{attn}/q_norm"),
        *norm(f"{block}.attn.k_norm", f"{attn}/k_norm"),
        *(Row(f"{block}.gamma_{n}", f"{_BLOCK}/scale{n}/gamma") for n in (1, 2)),
        *norm(f"{block}.attn.norm", f"{attn}/norm"),
        *merge_heads(f"{block}.attn.proj", f"{attn}/out"),
        *norm(f"{block}.norm2", f"{_BLOCK}/norm2"),
        *mlp,
        *norm(f"{block}.mlp.norm", f"{_BLOCK}/mlp/norm"),
        *dense(f"{block}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
        *norm("norm", "norm"),
        *norm("fc_norm", "fc_norm"),
        *vit_formats.attention_pool(),
        *dense("head", "projection"),
    ]


def eva_table(config: ImageConfig) -> Table:
    """A file of timm's with an EVA trunk alone."""
    assert isinstance(config.trunk, EvaConfig)
    rows = eva_rows(config.trunk)
    head = [row for row in rows if row.source.startswith("head.")]
    return Table([*under((row for row in rows if row not in head), "", "trunk/"), *head], ignore=_BUFFERS)


def transformers_table(config: Config) -> Table:
    """`CLIPModel`, `SiglipModel`, or one tower of either; single towers are read with and without their prefix."""
    prefixes = {ImageConfig: "vision_model.", TextConfig: "text_model."}
    renames = []
    if prefix := prefixes.get(type(config), ""):
        renames = [(rf"^(?!{prefix}|(visual|text)_projection\.)", prefix)]
    if isinstance(config, ImageConfig):
        return Table(_transformers_image(), renames, _BUFFERS)
    if isinstance(config, TextConfig):
        return Table(_transformers_text(config), renames, _BUFFERS)
    image, text = under(_transformers_image(), "", "image/"), under(_transformers_text(config.text), "", "text/")
    return Table([*image, *text, *_scalars(vectors=config.logit_bias_init is not None)], ignore=_BUFFERS)


def _scalars(vectors: bool = False) -> list[Row]:
    """() in CLIP's files, (1,) in transformers' SigLIP and in some of open_clip's: both are read, `vectors` written."""
    patterns = ("1 ->", "") if vectors else ("", "1 ->")
    return [Row(name, name, pattern) for name in ("logit_scale", "logit_bias") for pattern in patterns]


def open_clip_image() -> list[Row]:
    """The tower of OpenAI's and OpenCLIP's files, without their prefix."""
    return [
        Row("class_embedding", "trunk/embed/cls_token", "D -> 1 1 D"),
        Row("positional_embedding", "trunk/embed/pos_embed", "T D -> 1 T D"),
        *conv("conv1", "trunk/patch_embed"),
        *norm("ln_pre", "trunk/pre_norm"),
        *_resblocks("trunk/"),
        *norm("ln_post", "trunk/norm"),
        *norm("ln_post", "trunk/fc_norm"),  # where it follows the pooling
        Row("proj", "projection/kernel"),
    ]


def _open_clip_text(config: TextConfig) -> list[Row]:
    parameter, linear = Row("text_projection", "projection/kernel"), dense("text_projection", "projection")
    return [
        Row("token_embedding.weight", "token_embed/embedding"),
        Row("positional_embedding", "pos_embed"),
        *_resblocks(""),
        *norm("ln_final", "norm"),
        *([*linear, parameter] if config.projection_bias else [parameter, *linear]),
    ]


def _resblocks(target: str) -> list[Row]:
    source, block = "transformer.resblocks.{i}", f"{target}{_BLOCK}"
    return [
        *norm(f"{source}.ln_1", f"{block}/norm1"),
        *_in_proj(f"{source}.attn", f"{block}/attn"),
        *norm(f"{source}.ln_2", f"{block}/norm2"),
        *dense(f"{source}.mlp.c_fc", f"{block}/mlp/fc1"),
        *dense(f"{source}.mlp.c_proj", f"{block}/mlp/fc2"),
        *(Row(f"{source}.ls_{n}.gamma", f"{block}/scale{n}/gamma") for n in (1, 2)),
    ]


def _in_proj(source: str, target: str) -> list[Row]:
    """torch.nn.MultiheadAttention."""
    rows = packed_heads(f"{source}.in_proj", target)
    return [
        *(replace(row, source=row.source.replace("in_proj.", "in_proj_")) for row in rows),
        *merge_heads(f"{source}.out_proj", f"{target}/out"),
    ]


def _transformers_image() -> list[Row]:
    model = "vision_model"
    return [
        Row(f"{model}.embeddings.class_embedding", "trunk/embed/cls_token", "D -> 1 1 D"),
        Row(f"{model}.embeddings.position_embedding.weight", "trunk/embed/pos_embed", "T D -> 1 T D"),
        *conv(f"{model}.embeddings.patch_embedding", "trunk/patch_embed"),
        *norm(f"{model}.pre_layrnorm", "trunk/pre_norm"),
        *_transformers_layers(model, "trunk/"),
        *norm(f"{model}.post_layernorm", "trunk/norm"),
        Row(f"{model}.head.probe", "trunk/map_head/probe"),
        *_in_proj(f"{model}.head.attention", "trunk/map_head/attn"),
        *norm(f"{model}.head.layernorm", "trunk/map_head/norm"),
        *dense(f"{model}.head.mlp.fc1", "trunk/map_head/mlp/fc1"),
        *dense(f"{model}.head.mlp.fc2", "trunk/map_head/mlp/fc2"),
        *dense("visual_projection", "projection"),
    ]


def _transformers_text(config: TextConfig) -> list[Row]:
    model = "text_model"
    return [
        Row(f"{model}.embeddings.token_embedding.weight", "token_embed/embedding"),
        Row(f"{model}.embeddings.position_embedding.weight", "pos_embed"),
        *_transformers_layers(model, ""),
        *norm(f"{model}.final_layer_norm", "norm"),
        *dense(f"{model}.head" if config.projection_bias else "text_projection", "projection"),  # SigLIP's, CLIP's
    ]


def _transformers_layers(model: str, target: str) -> list[Row]:
    source, block = f"{model}.encoder.layers.{{i}}", f"{target}{_BLOCK}"
    return [
        *norm(f"{source}.layer_norm1", f"{block}/norm1"),
        *(row for name in QKV for row in heads(f"{source}.self_attn.{name[0]}_proj", f"{block}/attn/{name}")),
        *merge_heads(f"{source}.self_attn.out_proj", f"{block}/attn/out"),
        *norm(f"{source}.layer_norm2", f"{block}/norm2"),
        *dense(f"{source}.mlp.fc1", f"{block}/mlp/fc1"),
        *dense(f"{source}.mlp.fc2", f"{block}/mlp/fc2"),
    ]
