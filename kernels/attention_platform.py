"""The device that a program is traced for, as far as the choice of an attention kernel needs it."""

from typing import NamedTuple

import jax


class Platform(NamedTuple):
    """cpu, gpu or tpu; what the chip calls itself; the compute capability of NVIDIA's."""

    name: str
    device_kind: str
    capability: tuple[int, int] | None = None


def platform() -> Platform:
    """The mesh in use says (it may be of chips that are not here), else the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return Platform(device.platform, device.device_kind, cuda_capability() if device.platform == "gpu" else None)


def cuda_capability() -> tuple[int, int] | None:
    """(major, minor) of the local NVIDIA GPU; None without one: an AMD GPU has no cuDNN."""
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
