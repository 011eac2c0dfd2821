"""T5, Flan-T5, mT5 and umT5 checkpoints of transformers, both ways; encoders alone too."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ...models.t5 import T5, T5Config
from ..bundle import Bundle
from ..family import Checkpoint, Family, Overrides, fields_of
from ..files.placement import Tree
from ..files.source import Source
from ..files.writers import write_directory
from ..mapping import Row, Table, save_tensors
from ..rows import dense, heads, merge_heads, norm

MODEL_TYPES = ("t5", "mt5", "umt5")
_ENCODERS = ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel")


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
    """The names of transformers; copies of the shared embedding, and of a tied head, hold nothing of their own."""
    copies = [r"(en|de)coder\.embed_tokens\.weight", *([r"lm_head\.weight"] if c.tie_embeddings else [])]
    early = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    stacks = ["encoder", *(["decoder"] if c.decoder_depth else [])]
    return Table(
        rows=[
            Row("shared.weight", "embed_tokens/embedding"),
            *(row for stack in stacks for row in _stack(c, stack)),
            *dense("lm_head", "lm_head"),
        ],
        ignore=[*copies, early],
    )


def recognise(source: Source) -> str | None:
    """The format of a T5 checkpoint; None if it is not one. Without its config.json a file does not tell its heads."""
    return "transformers" if source.config.get("model_type") in MODEL_TYPES else None


def read(source: Source, format: str, overrides: Overrides) -> T5Config:
    """What config.json says; whether there is a decoder, and a head of its own, the tensors do."""
    config = from_transformers(source.config)
    decodes = any(name.startswith("decoder.block.") for name in source.tensors)
    tied = "lm_head.weight" not in source.tensors
    config = dataclasses.replace(config, decoder_depth=config.decoder_depth if decodes else 0, tie_embeddings=tied)
    return dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in fields_of(config)})


def from_transformers(published: dict[str, Any]) -> T5Config:
    """Reads a config.json; absent entries are the defaults of the class that `model_type` names."""
    kind = published["model_type"]
    c = (_T5 if kind == "t5" else _MT5) | published
    gate, _, activation = c["feed_forward_proj"].rpartition("-")
    activation = "gelu_new" if c["feed_forward_proj"] == "gated-gelu" else activation
    # T5 of 2019 ties its head and scales; later configs say so by tie_word_embeddings, transformers 5 in words. umT5
    # always scales, mT5 never does (transformers, modeling_*.py).
    scales = c.get("scale_decoder_outputs", c.get("tie_word_embeddings") is not False)
    return T5Config(
        vocab_size=c["vocab_size"],
        width=c["d_model"],
        depth=c["num_layers"],
        decoder_depth=c["num_layers"] if c["num_decoder_layers"] is None else c["num_decoder_layers"],
        num_heads=c["num_heads"],
        head_dim=c["d_kv"],
        mlp_dim=c["d_ff"],
        gated=c.get("is_gated_act", gate == "gated"),
        activation=c.get("dense_act_fn", activation),
        num_buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
        layer_bias=kind == "umt5",
        scale_logits={"t5": scales, "mt5": False, "umt5": True}[kind],
        eps=c["layer_norm_epsilon"],
        dropout=c["dropout_rate"],
    )


_MT5: dict[str, Any] = {
    "vocab_size": 250112,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": None,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
_T5 = _MT5 | {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"}


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
        "feed_forward_proj": f"{'gated-' if c.gated else ''}{_PUBLISHED.get(c.activation, c.activation)}",
        "dense_act_fn": c.activation,
        "is_gated_act": c.gated,
        "tie_word_embeddings": c.tie_embeddings,
        "dtype": dtype,
        **({"scale_decoder_outputs": c.scale_logits} if kind == "t5" else {}),
    }


_PUBLISHED = {"gelu_new": "gelu", "gelu_tanh": "gelu", "gelu_pytorch_tanh": "gelu"}


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model; files of tokenizers lie beside it in the checkpoint's directory."""
    return Bundle(
        model=T5(checkpoint.config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=checkpoint.config,
        format=checkpoint.format,
        metadata=checkpoint.source.config,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int) -> None:
    """Writes a directory as transformers does. See `omnax.hub.save`."""
    dtype = str(jax.tree.leaves(bundle.params)[0].dtype)
    documents = {"config.json": to_transformers(bundle.config, dtype, dict(bundle.metadata))}
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
)
