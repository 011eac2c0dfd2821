"""Loading and saving from two processes of four devices each: every one reads its own shards, the first one writes."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from omnax import hub
from omnax.hub.families.vit.family import abstract
from omnax.models.vit import ViT, ViTConfig

PROGRAM = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from omnax import hub
source, target = sys.argv[3:]
mesh = jax.make_mesh((1, 8), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
for scan in (False, True):
    bundle = hub.load(source, mesh=mesh, scan=scan)
    kernel = next(x for x in jax.tree.leaves(bundle.params) if x.ndim > 1 and not x.sharding.is_fully_replicated)
    assert len(kernel.addressable_shards) == 4 and not kernel.is_fully_addressable
    hub.save(bundle, f"{target}{scan}")
    hub.load(f"{target}{scan}")  # complete for every process as soon as save returns
adapted = hub.load(source, mesh=mesh, num_classes=16, image_size=(32, 24))
assert adapted.params["head"]["kernel"].sharding.mesh == mesh
"""


def test_two_processes(tmp_path):
    config = ViTConfig(
        width=16, depth=2, num_heads=2, mlp_dim=32, patch_size=(8, 8), image_size=(16, 16), num_classes=5, init="hf"
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract(config))
    hub.save(hub.Bundle(ViT(config), params, config), tmp_path / "in")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), tmp_path / "in", tmp_path / "out"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    whole = (tmp_path / "in" / "model.safetensors").read_bytes()
    for scan in (False, True):
        assert (tmp_path / f"out{scan}" / "model.safetensors").read_bytes() == whole
