"""BERT checkpoints of transformers, and BLIP-2's Q-Former by itself, both ways."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ...models.bert import Bert, BertConfig
from ...models.published import floats, integers
from ..bundle import Bundle
from ..family import Checkpoint, Family, Overrides, fields_of
from ..files.placement import Tree
from ..files.source import Source
from ..files.writers import write_directory
from ..keys import Section, harmless, only, used
from ..mapping import Row, Table, save_tensors
from ..rows import QKV, dense, heads, merge_heads, norm
from .transformers_keys import COMMON, HIDDEN_ACT

BERT, QFORMER = "bert", "blip_2_qformer"


def attention(source: str, word: str, target: str, after: str) -> list[Row]:
    """An attention layer and the norm behind it; `word` is the library's for the part that mixes."""
    parts = [row for name in QKV for row in heads(f"{source}.{word}.{name}", f"{target}/{name}")]
    out = merge_heads(f"{source}.output.dense", f"{target}/out")
    return [*parts, *out, *norm(f"{source}.output.LayerNorm", after)]


def blocks(source: str, target: str, word: str = "self") -> list[Row]:
    """The rows of all blocks: `word` is "self" in BERT and LAVIS, "attention" in transformers' Q-Former."""
    layer, block = f"{source}encoder.layer.{{i}}", f"{target}blocks_{{i}}"
    return [
        *attention(f"{layer}.attention", word, f"{block}/attn", f"{block}/norm1"),
        *attention(f"{layer}.crossattention", word, f"{block}/cross", f"{block}/cross_norm"),
        *(
            row
            for theirs, ours in (("", ""), ("_query", "query_"))
            for row in (
                *dense(f"{layer}.intermediate{theirs}.dense", f"{block}/{ours}mlp/fc1"),
                *dense(f"{layer}.output{theirs}.dense", f"{block}/{ours}mlp/fc2"),
                *norm(f"{layer}.output{theirs}.LayerNorm", f"{block}/{ours}norm2"),
            )
        ),
    ]


def embeddings(source: str, target: str = "") -> list[Row]:
    """Words, positions and kinds."""
    names = {"word": "token_embed", "position": "pos_embed", "token_type": "type_embed"}
    return [Row(f"{source}{theirs}_embeddings.weight", f"{target}{ours}/embedding") for theirs, ours in names.items()]


def lm_head(source: str, target: str = "") -> list[Row]:
    """`cls.predictions`, whose matrix is the table of embeddings."""
    return [
        *dense(f"{source}cls.predictions.transform.dense", f"{target}head_dense"),
        *norm(f"{source}cls.predictions.transform.LayerNorm", f"{target}head_norm"),
        Row(f"{source}cls.predictions.bias", f"{target}head_bias"),
    ]


# Copies of what is tied, buffers of early files, and the head of sentence order, which nothing here has.
COPIES = (r".*cls\.predictions\.decoder\.(weight|bias)", r".*\.position_ids", r"cls\.seq_relationship\..*")
_ERAS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def table(c: BertConfig) -> Table:
    """The names of BertModel, of BertForMaskedLM where there is a head, or of Blip2QFormerModel."""
    if c.query_mlp:
        return Table([*norm("layernorm", "embed_norm"), *blocks("", "", "attention")])
    prefix = "bert." if c.lm_head else ""
    rows = [
        *embeddings(f"{prefix}embeddings."),
        *norm(f"{prefix}embeddings.LayerNorm", "embed_norm"),
        *blocks(prefix, ""),
        *dense(f"{prefix}pooler.dense", "pooler"),
        *lm_head(""),
    ]
    return Table(rows, renames=_ERAS if c.lm_head else (*_ERAS, (r"^bert\.", "")), ignore=COPIES)


def recognise(source: Source) -> str | None:
    """The format of a BERT or Q-Former; None if it is neither. Without config.json a file does not tell its heads."""
    return "transformers" if source.config.get("model_type") in (BERT, QFORMER) else None


def read(source: Source, format: str, overrides: Overrides) -> BertConfig:
    """What config.json says; whether there are a pooler and a head, the tensors do."""
    config = from_transformers(source.config, source.where)
    if source.config["model_type"] == BERT:
        has = {part: any(re.search(part, name) for name in source.tensors) for part in ("pooler", r"cls\.predictions")}
        config = dataclasses.replace(config, pooler=has["pooler"], lm_head=has[r"cls\.predictions"])
    return dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in fields_of(config)})


_SHARED = {
    **COMMON,
    "vocab_size": used("count", 30522),
    "hidden_size": used("count", 768),
    "num_hidden_layers": used("count", 12),
    "num_attention_heads": used("count", 12),
    "intermediate_size": used("count", 3072),
    "hidden_act": used("text", "gelu", choices=HIDDEN_ACT),
    "hidden_dropout_prob": used("number", 0.1),
    "attention_probs_dropout_prob": used("number", 0.1),
    "max_position_embeddings": used("count", 512),
    "layer_norm_eps": used("positive", 1e-12),
    "position_embedding_type": only("absolute"),  # of old files; transformers 5 has no other
}
BERT_KEYS = Section(
    {
        **_SHARED,
        "type_vocab_size": used("count", 2),
        "is_decoder": only(False),
        "add_cross_attention": only(False),
        "tie_word_embeddings": only(True),
        "classifier_dropout": harmless("training"),
        **dict.fromkeys(("directionality", "pooler_fc_size", "pooler_num_attention_heads"), harmless("ignored")),
        **dict.fromkeys(("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"), harmless("ignored")),
    }
)
QFORMER_KEYS = Section(
    {
        **_SHARED,
        "cross_attention_frequency": used("count", 2),
        "encoder_hidden_size": used("count", 1408),
        "use_qformer_text_input": used("flag", False),
        "qformer_text_input": used("flag", None),  # the same in early files of the ITM checkpoints
    },
    "qformer_config",
)


def from_transformers(published: Mapping[str, Any], where: str = "config.json") -> BertConfig:
    """Reads the config.json of a BertModel or of a Blip2QFormerModel."""
    if published["model_type"] == QFORMER:
        c = dataclasses.replace(QFORMER_KEYS, name="").read(published, where)
        return dataclasses.replace(qformer_config(c), vocab_size=0)
    c = BERT_KEYS.read(published, where)
    return BertConfig(**_shape(c) | {"num_types": c["type_vocab_size"]})


def qformer_config(c: Mapping[str, Any]) -> BertConfig:
    """The Q-Former that the values of `QFORMER_KEYS` describe; it has embeddings where it reads text."""
    text = c["use_qformer_text_input"] or bool(c["qformer_text_input"])
    shape: dict[str, Any] = _shape(c) | ({} if text else {"vocab_size": 0})
    return BertConfig(
        **shape,
        num_types=0,
        text_mlp=text,
        query_mlp=True,
        cross_every=c["cross_attention_frequency"],
        context_width=c["encoder_hidden_size"],
    )


# Our field -> the key of both configs.
_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}


def _shape(c: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: c[theirs] for ours, theirs in _NAMES.items()} | {"activation": HIDDEN_ACT[c["hidden_act"]]}


def to_transformers(c: BertConfig) -> dict[str, Any]:
    """The keys of either config."""
    hidden_act = {"gelu_tanh": "gelu_new"}.get(c.activation, c.activation)
    shared = {theirs: getattr(c, ours) for ours, theirs in _NAMES.items()} | {"hidden_act": hidden_act}
    if not c.query_mlp:
        head = "BertForMaskedLM" if c.lm_head else "BertModel"
        return {"model_type": BERT, "architectures": [head], **shared, "type_vocab_size": c.num_types}
    if not c.vocab_size:
        del shared["vocab_size"]
    return {
        "model_type": QFORMER,
        **shared,
        "cross_attention_frequency": c.cross_every,
        "encoder_hidden_size": c.context_width,
        "use_qformer_text_input": c.text_mlp,
    }


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model; files of tokenizers lie beside it in the checkpoint's directory."""
    return Bundle(
        model=Bert(checkpoint.config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=checkpoint.config,
        format=checkpoint.format,
        metadata=checkpoint.source.config,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int) -> None:
    """Writes a directory as transformers does. See `omnax.hub.save`."""
    document = dict(bundle.metadata) | to_transformers(bundle.config)
    if bundle.config.query_mlp:
        document |= {"architectures": ["Blip2QFormerModel"]}
    write_directory(path, save_tensors(bundle.params, table(bundle.config)), {"config.json": document}, max_shard_size)


def abstract(c: BertConfig) -> Tree:
    """Shapes of the parameters."""
    if not c.query_mlp:
        return jax.eval_shape(Bert(c).init, jax.random.key(0), integers(1, 2))["params"]
    context = floats(1, 1, c.context_width) if c.cross_every else None
    init = functools.partial(Bert(c).init, method="initialize")
    return jax.eval_shape(init, jax.random.key(0), floats(1, 1, c.width), context)["params"]


FAMILY = Family(
    name="BERT",
    config=BertConfig,
    formats=("transformers",),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: table(config),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    keys={"transformers: BertConfig": BERT_KEYS, "transformers: Blip2QFormerConfig": QFORMER_KEYS},
)
