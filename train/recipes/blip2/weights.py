"""Parameters of BLIP-2 from and for elsewhere: its parts' published weights, layouts, what each stage hands on."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array

from .... import hub
from ....models.blip2.model import Blip2, Blip2Config, init_params
from ....models.layers import stack_layers, unstack_layers
from ...rules import Tree, flatten, unflatten

PARTS = ("blip2", "vision", "bert", "language")


def load(path: str, config: Blip2Config) -> Tree:
    """A BLIP-2 checkpoint, or its parts from several: "vision=DIR,bert=DIR", "blip2=FILE,vision=DIR,language=DIR".

    What the model of `config` has no place for stays behind (a tower's last block, a Q-Former's text side); what is new
    in it is missing, and named by whoever begins with it (init_from.skip). ValueError for an unknown part.
    """
    if "=" not in path:
        return wanted(hub.load(path).params, config)
    params: Tree = {}
    for part in path.split(","):
        name, _, source = part.partition("=")
        if name not in PARTS:
            raise ValueError(f"init_from.path names {name!r}, expected some of {PARTS}: {path!r}")
        found = hub.load(source)
        if name == "vision":
            tower = found.params.get("image", found.params)
            params["vision"] = tower.get("trunk", tower.get("vision", tower))
        elif name == "bert":
            params["qformer"] = from_bert(found.params, config)
        elif name == "language":
            params["language"] = found.params
        else:
            params |= found.params
    return wanted(params, config)


def wanted(params: Tree, config: Blip2Config) -> Tree:
    """In the layout of `config`, without what it has not."""
    shapes = flatten(jax.eval_shape(lambda: init_params(Blip2(config), jax.random.key(0))))
    return unflatten({path: x for path, x in flatten(adapt(params, config)).items() if path in shapes})


def adapt(params: Tree, config: Blip2Config) -> Tree:
    """Brings image encoder and language model into the layer layouts of `config`; a tower may have blocks to spare."""
    towers = {"vision": config.vision, "language": config.opt or config.t5}
    for name, tower in towers.items():
        if name not in params or tower is None:
            continue
        leaves = flatten(unstack_layers(params[name]))
        depth = tower.depth
        kept = {path: x for path, x in leaves.items() if name != "vision" or _block(path) < depth}
        part = unflatten(kept)
        params = params | {name: stack_layers(part) if tower.scan else part}
    return params


def _block(path: str) -> int:
    """The number of the block that a parameter lies in; -1 outside."""
    numbers = [part.removeprefix("blocks_") for part in path.split("/") if part.startswith("blocks_")]
    return int(numbers[0]) if numbers else -1


def from_bert(params: Tree, config: Blip2Config) -> Tree:
    """A Q-Former that begins as a BERT: queries' feed-forward layers are copies of the text's, new tokens are drawn.

    Cross-attention, and kinds of tokens, a BERT has not, or a Q-Former.
    """
    found = {path: x for path, x in flatten(params).items() if not path.startswith(("type_embed", "pooler"))}
    copies = ("mlp/fc1", "mlp/fc2", "norm2")
    for path, x in list(found.items()):
        block, _, rest = path.partition("/")
        if block.startswith("blocks_") and rest.startswith(copies):
            found[f"{block}/query_{rest}"] = x
    new = config.qformer.vocab_size - len(found["token_embed/embedding"])
    if new < 0:
        raise ValueError(f"the BERT has {-new} tokens more than model.qformer.vocab_size {config.qformer.vocab_size}")
    drawn = 0.02 * jax.random.normal(jax.random.key(0), (new, config.qformer.width))
    found["token_embed/embedding"] = jnp.concatenate([found["token_embed/embedding"], drawn])
    if "head_bias" in found:
        found["head_bias"] = jnp.pad(found["head_bias"], (0, new))
    return unflatten(found)


def patch_tower(vision: Tree) -> Tree:
    """An encoder of one block that changes nothing: tokens are pixels / 1.5, and 3 in the channel of their place.

    What a frozen encoder of drawn tiles needs to say; one with random weights says it far less clearly. Its width is
    the pixels of a patch and a channel a patch.
    """
    leaves = flatten(vision)
    rows, columns, channels, width = leaves["patch_embed/kernel"].shape
    pixels, places = rows * columns * channels, leaves["embed/pos_embed"].shape[1] - 1
    if width != pixels + places:
        raise ValueError(f"patch_tower needs a width of {pixels} + {places}, got {width}")
    table = np.zeros((1, places + 1, width), np.float32)
    table[0, 1:, pixels:] = 3 * np.eye(places)
    fixed: dict[str, Any] = {
        path: jnp.zeros_like(x) for path, x in leaves.items() if "/out/" in path or "/fc2/" in path
    }
    kernel = rearrange(np.eye(pixels, width, dtype=np.float32) / 1.5, "(x y c) d -> x y c d", x=rows, y=columns)
    fixed |= {"patch_embed/kernel": jnp.asarray(kernel), "patch_embed/bias": jnp.zeros(width)}
    fixed |= {"embed/pos_embed": jnp.asarray(table), "embed/cls_token": jnp.ones((1, 1, width))}
    return unflatten(leaves | fixed)


def exported(
    model: Blip2Config, params: Tree, format: str, *, first_stage: bool
) -> tuple[Blip2Config, dict[str, Array]]:
    """The model of one stage as a format has it, with its part of the parameters."""
    qformer = dataclasses.replace(model.qformer, remat="none")
    fields: dict[str, Any] = {"qformer": qformer}
    if first_stage:
        fields |= {"opt": None, "t5": None, "language_width": 0, "image_token": None}
        if format == "transformers":
            fields |= {"qformer": dataclasses.replace(qformer, lm_head=False), "temperature": False}
    else:
        reader = dataclasses.replace(qformer, text_mlp=False, vocab_size=0, lm_head=False)
        fields |= {"qformer": reader, "embed_dim": 0, "temperature": False}
        if format == "lavis":
            fields |= {"opt": None, "t5": None, "image_token": None}
    if format == "lavis":
        fields |= {"vision": None}
    model = dataclasses.replace(model, **fields)
    shapes = flatten(jax.eval_shape(lambda: init_params(Blip2(model), jax.random.key(0))))
    return model, unflatten({path: x for path, x in flatten(params).items() if path in shapes})


def tokenizer_document(folder: str, drawn: bytes) -> bytes:
    """The tokenizer.json of a folder; without one that of the drawn tiles."""
    return (Path(folder) / "tokenizer.json").read_bytes() if folder else drawn
