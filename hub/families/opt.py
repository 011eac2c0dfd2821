"""OPT checkpoints of transformers, both ways."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ...models.opt import OPT, OPTConfig
from ...models.published import integers
from ..bundle import Bundle
from ..family import Checkpoint, Family, Overrides, fields_of
from ..files.placement import Tree
from ..files.source import Source
from ..files.writers import write_directory
from ..keys import Section, harmless, only, used
from ..mapping import Row, Table, save_tensors
from ..rows import QKV, dense, heads, merge_heads, norm
from .transformers_keys import COMMON, HIDDEN_ACT


def table(c: OPTConfig) -> Table:
    """The names of OPTForCausalLM; files of OPTModel have them without `model.`; a tied head is a copy."""
    layer, block = "model.decoder.layers.{i}", "layers/blocks_{i}"
    rows = [
        Row("model.decoder.embed_tokens.weight", "embed_tokens/embedding"),
        Row("model.decoder.embed_positions.weight", "pos_embed/embedding"),
        *dense("model.decoder.project_in", "project_in"),
        *dense("model.decoder.project_out", "project_out"),
        *(row for name in QKV for row in heads(f"{layer}.self_attn.{name[0]}_proj", f"{block}/attn/{name}")),
        *merge_heads(f"{layer}.self_attn.out_proj", f"{block}/attn/out"),
        *norm(f"{layer}.self_attn_layer_norm", f"{block}/norm1"),
        *dense(f"{layer}.fc1", f"{block}/mlp/fc1"),
        *dense(f"{layer}.fc2", f"{block}/mlp/fc2"),
        *norm(f"{layer}.final_layer_norm", f"{block}/norm2"),
        *norm("model.decoder.final_layer_norm", "norm"),
        *dense("lm_head", "lm_head"),
    ]
    return Table(rows, renames=[(r"^decoder\.", "model.decoder.")], ignore=[r"lm_head\.weight"] * c.tie_embeddings)


def recognise(source: Source) -> str | None:
    """The format of an OPT checkpoint; None if it is not one. Without config.json a file does not tell its heads."""
    return "transformers" if source.config.get("model_type") == "opt" else None


def read(source: Source, format: str, overrides: Overrides) -> OPTConfig:
    """What config.json says."""
    config = from_transformers(source.config, source.where)
    return dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in fields_of(config)})


KEYS = Section(
    {
        **COMMON,
        "vocab_size": used("count", 50272),
        "hidden_size": used("count", 768),
        "num_hidden_layers": used("count", 12),
        "ffn_dim": used("count", 3072),
        "num_attention_heads": used("count", 12),
        "max_position_embeddings": used("count", 2048),
        "do_layer_norm_before": used("flag", True),
        "_remove_final_layer_norm": used("flag", False),
        "word_embed_proj_dim": used("count", None),
        "activation_function": used("text", "relu", choices=HIDDEN_ACT),
        "dropout": used("number", 0.1),
        "enable_bias": used("flag", True),
        "tie_word_embeddings": used("flag", True),
        "layer_norm_elementwise_affine": only(True),
        **dict.fromkeys(("layerdrop", "init_std"), harmless("training")),
    }
)


def from_transformers(published: Mapping[str, Any], where: str = "config.json") -> OPTConfig:
    """Reads a config.json; absent entries are the defaults of transformers' OPTConfig."""
    c = KEYS.read(published, where)
    embed_dim = c["word_embed_proj_dim"] or c["hidden_size"]
    return OPTConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["ffn_dim"],
        vocab_size=c["vocab_size"],
        max_positions=c["max_position_embeddings"],
        embed_dim=0 if embed_dim == c["hidden_size"] else embed_dim,
        pre_norm=c["do_layer_norm_before"],
        final_norm=c["do_layer_norm_before"] and not c["_remove_final_layer_norm"],
        use_bias=c["enable_bias"],
        tie_embeddings=c["tie_word_embeddings"],
        activation=HIDDEN_ACT[c["activation_function"]],
        dropout=c["dropout"],
    )


def to_transformers(c: OPTConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json; what `metadata` says beyond it stays. ValueError for another eps than the only one there is."""
    if c.eps != OPTConfig.eps:
        raise ValueError(f"transformers' OPT has norms of eps {OPTConfig.eps} alone, got {c.eps}")
    return dict(metadata) | {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "ffn_dim": c.mlp_dim,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_positions,
        "do_layer_norm_before": c.pre_norm,
        "_remove_final_layer_norm": c.pre_norm and not c.final_norm,
        "word_embed_proj_dim": c.embed_dim or c.width,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(c.activation, c.activation),
        "dropout": c.dropout,
        "enable_bias": c.use_bias,
        "tie_word_embeddings": c.tie_embeddings,
    }


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model; files of tokenizers lie beside it in the checkpoint's directory."""
    return Bundle(
        model=OPT(checkpoint.config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=checkpoint.config,
        format=checkpoint.format,
        metadata=checkpoint.source.config,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int) -> None:
    """Writes a directory as transformers does. See `omnax.hub.save`."""
    documents = {"config.json": to_transformers(bundle.config, bundle.metadata)}
    write_directory(path, save_tensors(bundle.params, table(bundle.config)), documents, max_shard_size)


def abstract(c: OPTConfig) -> Tree:
    """Shapes of the parameters."""
    return jax.eval_shape(OPT(c).init, jax.random.key(0), integers(1, 2))["params"]


FAMILY = Family(
    name="OPT",
    config=OPTConfig,
    formats=("transformers",),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: table(config),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    keys={"transformers: OPTConfig": KEYS},
)
