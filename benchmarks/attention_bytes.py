"""Bytes that a ViT's training step moves on one TPU chip, by form of attention, beside big_vision's ViT.

    python -m omnax.benchmarks.attention_bytes B/16 L/16      # needs '.[tpu]', no TPU

Compiled for one chip with the TPU's compiler, never run: bfloat16, layers unrolled (a loop's body is counted once),
forward, backward and AdamW. Memory traffic and temporaries are the compiler's own figures; of a Pallas kernel it knows
the operands and results alone, not what the kernel reads again. "none" hands the values on: what is left without
attention. The peer is stated here independently of our models, in flax's own layers and attention, with its dtypes:
products, logits, softmax and residual stream in bfloat16, what norms hand on in float32.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..kernels.attention import attention
from ..models import layers
from ..models.vit import ViT, ViTConfig, config
from ..objectives.classification import softmax_cross_entropy
from ..train.compile import topology_devices

FORMS: dict[str, Callable[..., jax.Array]] = {
    "none": lambda query, key, value, **options: value,
    "xla": functools.partial(attention, backend="xla"),
    "rows": functools.partial(attention, backend="rows"),
    "splash": functools.partial(attention, backend="splash"),
    "auto": attention,
}


class PeerBlock(nn.Module):
    """One block of big_vision's ViT."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = x.dtype
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, dtype=dtype)(y, y)
        y = nn.LayerNorm()(x)
        y = nn.gelu(nn.Dense(self.mlp_dim, dtype=dtype)(y))
        return x + nn.Dense(x.shape[-1], dtype=dtype)(y)


class Peer(nn.Module):
    """big_vision's ViT: learned positions of the patches, class token, float32 head."""

    config: ViTConfig

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = True) -> dict[str, jax.Array]:
        c, patch, dtype = self.config, self.config.patch_size, image.dtype
        x = nn.Conv(c.width, patch, patch, "VALID", dtype=dtype)(image)
        x = x.reshape(len(x), -1, c.width)
        x = x + self.param("positions", nn.initializers.normal(c.width**-0.5), (1, x.shape[1], c.width), dtype)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, c.width), dtype)
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        for _ in range(c.depth):
            x = PeerBlock(c.num_heads, c.mlp_dim)(x)
        return {"logits": nn.Dense(c.num_classes)(nn.LayerNorm()(x)[:, 0])}


def compiled_step(model: nn.Module, images: int, size: int, device: Any) -> Any:
    """The compiled training step of a model on one chip, as train.update has it for one player."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=[device])
    optimizer = optax.adamw(1e-3)

    def step(params: Any, slots: Any, image: jax.Array, label: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            out: Any = model.apply({"params": params}, image, train=True)
            return softmax_cross_entropy(out["logits"], label)[0]

        value, gradients = jax.value_and_grad(loss)(params)
        updates, slots = optimizer.update(gradients, slots, params)
        return optax.apply_updates(params, updates), slots, value

    here = NamedSharding(mesh, PartitionSpec())
    image = jax.ShapeDtypeStruct((images, size, size, 3), jnp.bfloat16, sharding=here)
    label = jax.ShapeDtypeStruct((images,), jnp.int32, sharding=here)
    # Shapes outside the mesh: its chip is none that could hold a key.
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    state = params, jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=(0, 1)).lower(*state, image, label).compile()


def row(name: str, compiled: Any) -> str:
    """GiB moved, GiB of temporaries, TFLOP."""
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    moved, held = costs["bytes accessed"] / 2**30, memory.temp_size_in_bytes / 2**30
    return f"| {name} | {moved:.1f} | {held:.2f} | {costs['flops'] / 1e12:.2f} |"


def main() -> None:
    """Prints a table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="sizes of the ViT, as B/16")
    parser.add_argument("--images", type=int, default=64, help="per chip")
    parser.add_argument("--depth", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--topology", default="v5e:2x2", help="whose first chip it is")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    device = topology_devices(arguments.topology)[0]
    for name in arguments.models:
        c = config(name, num_classes=1000)
        c = dataclasses.replace(c, depth=arguments.depth or c.depth)
        print(f"\n{name}, {arguments.images} images, {device.device_kind}\n")
        print("| attention | GiB moved | GiB temporaries | TFLOP |")
        print("|---|---|---|---|")
        for form in arguments.forms:
            with mock.patch.object(layers, "attention", FORMS[form]):
                model = ViT(c, dtype=jnp.bfloat16)
                print(row(form, compiled_step(model, arguments.images, 224, device)), flush=True)
        print(row("big_vision", compiled_step(Peer(c), arguments.images, 224, device)), flush=True)


if __name__ == "__main__":
    main()
