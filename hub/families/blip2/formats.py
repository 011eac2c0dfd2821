"""The published formats of BLIP-2, transformers' directories and LAVIS's `.pth`: tables of tensors, configurations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ....models.blip2.model import VISIONS, Blip2Config, qformer
from ....models.opt import OPTConfig
from ....models.vit import ViTConfig
from ...files.tensors import TensorFile
from ...keys import Section, brief, harmless, nested, only, used
from ...mapping import Row, Table
from ...rows import QKV, conv, dense, merge_heads, norm, packed_heads, under
from .. import bert, opt, t5
from ..clip.formats import open_clip_image
from ..transformers_keys import COMMON, HIDDEN_ACT

_BLOCK = "vision/encoder/blocks_{i}"


def transformers_table(c: Blip2Config) -> Table:
    """Blip2Model and Blip2ForConditionalGeneration, or Blip2ForImageTextRetrieval."""
    layer = "vision_model.encoder.layers.{i}"
    rows = [
        Row("query_tokens", "queries"),
        Row("vision_model.embeddings.class_embedding", "vision/embed/cls_token"),
        Row("vision_model.embeddings.position_embedding", "vision/embed/pos_embed"),
        *conv("vision_model.embeddings.patch_embedding", "vision/patch_embed"),
        *norm(f"{layer}.layer_norm1", f"{_BLOCK}/norm1"),
        *packed_heads(f"{layer}.self_attn.qkv", f"{_BLOCK}/attn"),
        *merge_heads(f"{layer}.self_attn.projection", f"{_BLOCK}/attn/out"),
        *norm(f"{layer}.layer_norm2", f"{_BLOCK}/norm2"),
        *dense(f"{layer}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{layer}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
        *norm("vision_model.post_layernorm", "vision_norm"),
        *norm("qformer.layernorm", "qformer/embed_norm"),
        *bert.blocks("qformer.", "qformer/", "attention"),
        *bert.embeddings("embeddings.", "qformer/"),
        *dense("vision_projection", "image_proj"),
        *dense("text_projection", "text_proj"),
        *dense("itm_head", "match_head"),
        *dense("language_projection", "language_proj"),
    ]
    language = opt.table(c.opt) if c.opt else t5.table(c.t5) if c.t5 else Table([])
    return Table(
        [*rows, *under(language.rows, "language_model.", "language/")],
        renames=[(r"^language_model\.decoder\.(embed|layers|final|project)", r"language_model.model.decoder.\1")]
        if c.opt
        else (),
        ignore=[r".*\.position_ids", *(rf"language_model\.{pattern}" for pattern in language.ignore)],
    )


def lavis_table(c: Blip2Config, projection: str) -> Table:
    """LAVIS's names; `projection` is its word for that into the language model."""
    rows = [
        Row("query_tokens", "queries"),
        *(_lavis_clip() if c.vision and c.vision.pre_norm else _lavis_eva()),
        *norm("ln_vision", "vision_norm"),
        *bert.embeddings("Qformer.bert.embeddings.", "qformer/"),
        *norm("Qformer.bert.embeddings.LayerNorm", "qformer/embed_norm"),
        *bert.blocks("Qformer.bert.", "qformer/"),
        *bert.lm_head("Qformer.", "qformer/"),
        *dense("vision_proj", "image_proj"),
        *dense("text_proj", "text_proj"),
        *dense("itm_head", "match_head"),
        Row("temp", "temperature"),
        *dense(projection, "language_proj"),
    ]
    return Table(rows, ignore=bert.COPIES)


def _lavis_clip() -> list[Row]:
    return under((_as_vision(row) for row in open_clip_image()), "visual_encoder.", "")


def _as_vision(row: Row) -> Row:
    """A row of CLIP's image tower as one of ours."""
    return dataclasses.replace(row, target=tuple(path.replace("trunk/", "vision/") for path in row.targets))


def _lavis_eva() -> list[Row]:
    """Keys have no bias in these files: a softmax over keys would take it out again."""
    block = "visual_encoder.blocks.{i}"
    biases = (("query", "q", False), ("key", "k", True), ("value", "v", False))
    return [
        Row("visual_encoder.cls_token", "vision/embed/cls_token"),
        Row("visual_encoder.pos_embed", "vision/embed/pos_embed"),
        *conv("visual_encoder.patch_embed.proj", "vision/patch_embed"),
        *norm(f"{block}.norm1", f"{_BLOCK}/norm1"),
        Row(f"{block}.attn.qkv.weight", tuple(f"{_BLOCK}/attn/{x}/kernel" for x in QKV), "(N H) D -> D N H"),
        *(
            Row(f"{block}.attn.{letter}_bias", f"{_BLOCK}/attn/{name}/bias", "(N H) -> N H", optional=absent)
            for name, letter, absent in biases
        ),
        *merge_heads(f"{block}.attn.proj", f"{_BLOCK}/attn/out"),
        *norm(f"{block}.norm2", f"{_BLOCK}/norm2"),
        *dense(f"{block}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *dense(f"{block}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
    ]


VISION = Section(
    {
        **COMMON,
        "hidden_size": used("count", 1408),
        "intermediate_size": used("count", 6144),
        "num_hidden_layers": used("count", 39),
        "num_attention_heads": used("count", 16),
        "image_size": used("count", 224),
        "patch_size": used("count", 14),
        "hidden_act": used("text", "gelu", choices=HIDDEN_ACT),
        "layer_norm_eps": used("positive", 1e-6),
        "qkv_bias": used("flag", True),
        "num_channels": only(3),  # of early files; the class has three
        **dict.fromkeys(("dropout", "projection_dim", "initializer_factor"), harmless("ignored")),
    },
    "vision_config",
)
ROOT = Section(
    {
        **COMMON,
        "vision_config": nested(VISION),
        "qformer_config": nested(bert.QFORMER_KEYS),
        "text_config": used("object", None),  # read by the language model's family
        "num_query_tokens": used("count", 32),
        "image_text_hidden_size": used("count", 256),
        "image_token_index": used("whole", None),
        "use_decoder_only_language_model": harmless("ignored"),
        "initializer_factor": harmless("training"),
    }
)
_LANGUAGES = {"opt": opt.from_transformers, "t5": t5.from_transformers}


def from_transformers(published: Mapping[str, Any], file: TensorFile, where: str) -> Blip2Config:
    """What config.json says; which of the classes it is of, the tensors do.

    ValueError for entries that no model here has, and for the tensors of a language model that are another's.
    """
    root = ROOT.read(published, where)
    vision = _vision(root["vision_config"])
    reader = dataclasses.replace(bert.qformer_config(root["qformer_config"]), context_width=vision.width)
    fields: dict[str, Any] = {"vision": vision, "vision_eps": vision.eps, "num_queries": root["num_query_tokens"]}
    fields |= {"image_token": root["image_token_index"]}
    if "itm_head.weight" in file:
        # The embeddings are there whether or not the Q-Former has layers for text
        vocab = root["qformer_config"]["vocab_size"]
        reader = dataclasses.replace(reader, vocab_size=vocab)
        return Blip2Config(qformer=reader, embed_dim=root["image_text_hidden_size"], **fields)
    reader = dataclasses.replace(reader, vocab_size=0)
    return Blip2Config(qformer=reader, **fields, **_language(root["text_config"] or {}, file, where))


def _language(text: Mapping[str, Any], file: TensorFile, where: str) -> dict[str, Any]:
    kind = text.get("model_type") or "opt"
    if kind not in _LANGUAGES:
        raise ValueError(f"{where}, text_config: 'model_type' is {brief(kind)}, expected one of {[*_LANGUAGES]}")
    found = "t5" if any(name.startswith("language_model.encoder.") for name in file) else "opt"
    if found != kind:
        raise ValueError(f"{file.path} holds the tensors of {found}, {where} is of {kind}")
    body = _LANGUAGES[kind]({"model_type": kind} | dict(text), f"{where}, text_config")
    if isinstance(body, OPTConfig):
        return {"opt": body, "language_width": body.embed_dim or body.width}
    t5.check_copies(file, "language_model.")
    body = dataclasses.replace(body, tie_embeddings="language_model.lm_head.weight" not in file)
    return {"t5": body, "language_width": body.width}


def _vision(c: Mapping[str, Any]) -> ViTConfig:
    return dataclasses.replace(
        VISIONS["eva_clip_g"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        activation=HIDDEN_ACT[c["hidden_act"]],
        eps=c["layer_norm_eps"],
        qkv_bias=c["qkv_bias"],
    )


def to_transformers(c: Blip2Config, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json; what `metadata` says beyond it stays. ValueError without an image encoder."""
    if c.vision is None:
        raise ValueError("transformers has no BLIP-2 without its image encoder")
    v = c.vision
    vision = {
        "model_type": "blip_2_vision_model",
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "image_size": v.image_size[0],
        "patch_size": v.patch_size[0],
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(v.activation, v.activation),
        "layer_norm_eps": c.vision_eps,
        "qkv_bias": v.qkv_bias,
    }
    given = {name: dict(metadata.get(name) or {}) for name in ("vision_config", "qformer_config", "text_config")}
    text = given["text_config"]
    if c.opt:
        text = opt.to_transformers(c.opt, text)
    elif c.t5:
        text = t5.to_transformers(c.t5, text.get("dtype", "float32"), text)
    reader = bert.to_transformers(c.qformer)
    kind = "Blip2ForImageTextRetrieval" if c.embed_dim else "Blip2ForConditionalGeneration"
    return dict(metadata) | {
        "model_type": "blip-2",
        "architectures": metadata.get("architectures") or [kind],
        "vision_config": given["vision_config"] | vision,
        "qformer_config": given["qformer_config"] | reader,
        "text_config": text,
        "num_query_tokens": c.num_queries,
        "image_text_hidden_size": c.embed_dim or metadata.get("image_text_hidden_size", 256),
        "image_token_index": c.image_token,
    }


def projection_of(file: TensorFile) -> str:
    """LAVIS's name of the projection into the language model; "" without one."""
    return next((name for name in ("opt_proj", "t5_proj") if f"{name}.weight" in file), "")


def from_lavis(file: TensorFile, overrides: Mapping[str, Any]) -> Blip2Config:
    """What the shapes of a `.pth` say; what they do not (heads, activations) is that of the published models.

    `overrides` may have the image encoder ("vision") and the Q-Former ("qformer") of other sizes. ValueError without
    them for widths that no published model has.
    """
    width = file.shape("Qformer.bert.encoder.layer.0.crossattention.self.key.weight")[1]
    clip = "visual_encoder.class_embedding" in file
    trunk = VISIONS["clip_L" if clip or width == VISIONS["clip_L"].width else "eva_clip_g"]
    if "qformer" not in overrides and width != trunk.width:
        widths = sorted({VISIONS[name].width for name in ("clip_L", "eva_clip_g")})
        raise ValueError(f"{file.path} reads an image encoder of width {width}, LAVIS's have {widths}: give qformer=")
    vision = None
    if any(name.startswith("visual_encoder.") for name in file):
        positions = file.shape("visual_encoder.positional_embedding" if clip else "visual_encoder.pos_embed")[-2]
        vision = overrides.get("vision") or dataclasses.replace(
            trunk, image_size=math.isqrt(positions - 1) * trunk.patch_size[0]
        )
    text = "Qformer.bert.embeddings.word_embeddings.weight" in file
    head = any(name.startswith("Qformer.cls.predictions.") for name in file)
    reader = overrides.get("qformer") or qformer(trunk, text=text, lm_head=head)
    projection = projection_of(file)
    return Blip2Config(
        qformer=reader,
        vision=vision,
        num_queries=file.shape("query_tokens")[1],
        vision_eps=1e-5,
        embed_dim=file.shape("vision_proj.weight")[0] if "vision_proj.weight" in file else 0,
        temperature="temp" in file,
        language_width=file.shape(f"{projection}.weight")[0] if projection else 0,
    )
