"""Memory of the contrastive loss and its gradient per device, 2 to 64 devices at a fixed number of pairs per device.

    python -m omnax.benchmarks.contrastive_memory
    python -m omnax.benchmarks.contrastive_memory --topology v5e:16x16 --width 768

Compiled for virtual CPU devices or the chips of a TPU topology, never run: the numbers are the compiler's temporaries
of one device's program.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

FORMS = ("full", "rows", "ring")


def temporaries(form: str, devices: Sequence[Any], pairs: int, width: int) -> int:
    """Bytes of temporaries of one device's share of InfoNCE and its gradient."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from ..objectives.contrastive import info_nce

    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    rows, everywhere = PartitionSpec("data"), PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, everywhere), out_specs=everywhere)
    def loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return info_nce(image, text, scale, form=form, axis_name="data")[0]  # type: ignore[arg-type]

    shape = (len(devices) * pairs, width)
    features = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, rows))
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, everywhere))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    analysis = step.lower(features, features, scale).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main() -> None:
    """Prints MiB per device and form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=128, help="pairs per device")
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--topology", help="all chips of a TPU topology, as v5e:16x16")
    arguments = parser.parse_args()
    # Before jax starts: the devices of this process.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=64"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from ..train.compile import topology_devices

    if arguments.topology:
        groups = [topology_devices(arguments.topology)]
    else:
        groups = [jax.devices()[:number] for number in (2, 4, 8, 16, 32, 64)]
    print(f"{'devices':>7} {'batch':>6}" + "".join(f"{form + ' MiB':>12}" for form in FORMS))
    for devices in groups:
        sizes = (temporaries(form, devices, arguments.pairs, arguments.width) for form in FORMS)
        cells = "".join(f"{size / 2**20:12.2f}" for size in sizes)
        print(f"{len(devices):>7} {len(devices) * arguments.pairs:>6}{cells}", flush=True)


if __name__ == "__main__":
    main()
