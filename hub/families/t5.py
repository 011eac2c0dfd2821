"""T5, Flan-T5, mT5 and umT5 checkpoints of transformers, both ways; encoders alone too."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...models.t5 import T5, T5Config
from ...storage.paths import read_whole
from ..bundle import Bundle
from ..family import Checkpoint, Family, Overrides, fields_of
from ..files.placement import Tree
from ..files.source import Source
from ..files.tensors import TensorFile
from ..files.writers import write_directory
from ..keys import Section, harmless, used
from ..mapping import Row, Table, save_tensors
from ..rows import dense, heads, merge_heads, norm
from .transformers_keys import COMMON, HIDDEN_ACT

MODEL_TYPES = ("t5", "mt5", "umt5")
DOCUMENTS = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
DOCUMENTS += ("added_tokens.json", "generation_config.json")
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight, where a file has them


def _attention(source: str, target: str) -> tuple[Row, ...]:
    rows = [row for name in ("query", "key", "value") for row in heads(f"{source}.{name[0]}", f"{target}/{name}")]
    return *rows, *merge_heads(f"{source}.o", f"{target}/out")


def _stack(c: T5Config, stack: str) -> list[Row]:
    decoder = stack == "decoder"
    layer, block = f"{stack}.block.{{i}}.layer", f"{stack}/layers/blocks_{{i}}"
    bias = "SelfAttention.relative_attention_bias.weight"
    mlp = f"{layer}.{2 if decoder else 1}"
    return [
        *norm(f"{layer}.0.layer_norm", f"{block}/norm1"),
        *_attention(f"{layer}.0.SelfAttention", f"{block}/attn"),
        Row(f"{layer}.0.{bias}", f"{block}/position_bias/embedding")
        if c.layer_bias
        else Row(f"{stack}.block.0.layer.0.{bias}", f"{stack}/position_bias/embedding"),
        *(norm(f"{layer}.1.layer_norm", f"{block}/norm2") if decoder else ()),
        *(_attention(f"{layer}.1.EncDecAttention", f"{block}/cross") if decoder else ()),
        *norm(f"{mlp}.layer_norm", f"{block}/norm3"),
        *(dense(f"{mlp}.DenseReluDense.wi_0", f"{block}/mlp/gate") if c.gated else ()),
        *dense(f"{mlp}.DenseReluDense.{'wi_1' if c.gated else 'wi'}", f"{block}/mlp/fc1"),
        *dense(f"{mlp}.DenseReluDense.wo", f"{block}/mlp/fc2"),
        *norm(f"{stack}.final_layer_norm", f"{stack}/norm"),
    ]


def table(c: T5Config) -> Table:
    """The names of transformers; copies of the shared embedding hold nothing of their own."""
    early = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    stacks = ["encoder", *(["decoder"] if c.decoder_depth else [])]
    return Table(
        rows=[
            Row("shared.weight", "embed_tokens/embedding"),
            *(row for stack in stacks for row in _stack(c, stack)),
            *dense("lm_head", "lm_head"),
        ],
        ignore=[*map(re.escape, _COPIES), early],
    )


def recognise(source: Source) -> str | None:
    """The format of a T5 checkpoint; None if it is not one. Without its config.json a file does not tell its heads."""
    return "transformers" if source.config.get("model_type") in MODEL_TYPES else None


def read(source: Source, format: str, overrides: Overrides) -> T5Config:
    """What config.json says; whether there is a decoder, and a head of its own, the tensors do."""
    file = source.tensors
    config = from_transformers(source.config, f"{source.directory}: config.json")
    if any(name.startswith("decoder.block.") for name in file):
        if not source.config.get("is_encoder_decoder", True):
            raise ValueError(f"{file.path} has a decoder, and its config.json says 'is_encoder_decoder': false")
    else:
        config = dataclasses.replace(config, decoder_depth=0)
    check_copies(file)
    config = dataclasses.replace(config, tie_embeddings="lm_head.weight" not in file)
    return dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in fields_of(config)})


def check_copies(file: TensorFile, prefix: str = "") -> None:
    """ValueError where what has to be a copy of the table of embeddings is another."""
    shared = f"{prefix}shared.weight"
    for name in (prefix + copy for copy in _COPIES):
        if name in file and not np.array_equal(file[name].view(), file[shared].view()):
            raise ValueError(f"{file.path}: {name!r} is not {shared!r}; no T5 here has two tables of embeddings")


def _keys(**defaults: Any) -> Section:
    """T5Config, MT5Config and UMT5Config of transformers: the same keys with other defaults."""
    keys = {
        **COMMON,
        "vocab_size": used("count", 250112),
        "d_model": used("count", 512),
        "d_kv": used("count", 64),
        "d_ff": used("count", 1024),
        "num_layers": used("count", 8),
        "num_decoder_layers": used("count", None),
        "num_heads": used("count", 6),
        "relative_attention_num_buckets": used("count", 32),
        "relative_attention_max_distance": used("count", 128),
        "dropout_rate": used("number", 0.1),
        "layer_norm_epsilon": used("number", 1e-6),
        "feed_forward_proj": used("text", "gated-gelu", choices=_PROJECTIONS),
        "dense_act_fn": used("text", None, choices=HIDDEN_ACT),
        "is_gated_act": used("flag", None),
        "tie_word_embeddings": used("flag", None),
        "scale_decoder_outputs": used("flag", None),
        "initializer_factor": harmless("training"),
        "classifier_dropout": harmless("training"),
        "output_past": harmless("outputs"),
        "n_positions": harmless("ignored"),
    }
    return Section(keys | {name: dataclasses.replace(keys[name], default=value) for name, value in defaults.items()})


_PROJECTIONS = tuple(f"{gate}{name}" for gate in ("", "gated-") for name in HIDDEN_ACT)
_TITLES = {"t5": "T5Config", "mt5": "MT5Config", "umt5": "UMT5Config"}
KEYS = {
    "t5": _keys(vocab_size=32128, d_ff=2048, num_layers=6, num_heads=8, feed_forward_proj="relu"),
    "mt5": _keys(),
    "umt5": _keys(),
}


def from_transformers(published: dict[str, Any], where: str = "config.json") -> T5Config:
    """Reads a config.json; absent entries are the defaults of the class that `model_type` names."""
    kind = published["model_type"]
    c = KEYS[kind].read(published, where)
    gate, _, activation = c["feed_forward_proj"].rpartition("-")
    activation = "gelu_new" if c["feed_forward_proj"] == "gated-gelu" else activation
    # The T5 of 2019 ties its head and scales; later configs say no by tie_word_embeddings, transformers 5 in words.
    # umT5 always scales, mT5 never does (transformers, modeling_*.py).
    scales = c["scale_decoder_outputs"]
    scales = c["tie_word_embeddings"] is not False if scales is None else scales
    return T5Config(
        vocab_size=c["vocab_size"],
        width=c["d_model"],
        depth=c["num_layers"],
        decoder_depth=c["num_decoder_layers"] or c["num_layers"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        mlp_dim=c["d_ff"],
        gated=gate == "gated" if c["is_gated_act"] is None else c["is_gated_act"],
        activation=HIDDEN_ACT[c["dense_act_fn"] or activation],
        num_buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
        layer_bias=kind == "umt5",
        scale_logits={"t5": scales, "mt5": False, "umt5": True}[kind],
        eps=c["layer_norm_epsilon"],
        dropout=c["dropout_rate"],
    )


def to_transformers(c: T5Config, dtype: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a T5, or of a umT5 where every layer has its biases; what `metadata` says beyond it stays."""
    kind = "umt5" if c.layer_bias else metadata.get("model_type", "t5")
    if kind != "t5" and c.scale_logits != (kind == "umt5") and c.decoder_depth:
        raise ValueError(f"transformers has no {kind} with scale_logits={c.scale_logits}")
    name = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[kind]
    return metadata | {
        "model_type": kind,
        "architectures": [f"{name}ForConditionalGeneration" if c.decoder_depth else f"{name}EncoderModel"],
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": c.head_dim,
        "d_ff": c.mlp_dim,
        "num_layers": c.depth,
        "num_decoder_layers": c.decoder_depth or c.depth,
        "num_heads": c.num_heads,
        "relative_attention_num_buckets": c.num_buckets,
        "relative_attention_max_distance": c.max_distance,
        "dropout_rate": c.dropout,
        "layer_norm_epsilon": c.eps,
        "feed_forward_proj": f"{'gated-' if c.gated else ''}{c.activation.removesuffix('_tanh')}",
        "dense_act_fn": _PUBLISHED.get(c.activation, c.activation),
        "is_gated_act": c.gated,
        "tie_word_embeddings": c.tie_embeddings,
        "dtype": dtype,
        **({"scale_decoder_outputs": c.scale_logits} if kind == "t5" else {}),
    }


_PUBLISHED = {"gelu_tanh": "gelu_new"}


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model, with the tokeniser's files (name -> content) where they lie beside it."""
    files = (checkpoint.source.directory / name for name in DOCUMENTS)
    return Bundle(
        model=T5(checkpoint.config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=checkpoint.config,
        processor={file.name: read_whole(file) for file in files if file.is_file()} or None,
        format=checkpoint.format,
        metadata=checkpoint.source.config,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int) -> None:
    """Writes a directory as transformers does. See `omnax.hub.save`."""
    dtype = str(jax.tree.leaves(bundle.params)[0].dtype)
    documents: dict[str, Any] = dict(bundle.processor or {})
    documents["config.json"] = to_transformers(bundle.config, dtype, dict(bundle.metadata))
    write_directory(path, save_tensors(bundle.params, table(bundle.config)), documents, max_shard_size)


def abstract(config: T5Config) -> Tree:
    """Shapes of the parameters."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    inputs = (tokens, tokens) if config.decoder_depth else (tokens,)
    return jax.eval_shape(T5(config).init, jax.random.key(0), *inputs)["params"]


FAMILY = Family(
    name="T5",
    config=T5Config,
    formats=("transformers",),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: table(config),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    keys={f"transformers: {title}": KEYS[kind] for kind, title in _TITLES.items()},
)
