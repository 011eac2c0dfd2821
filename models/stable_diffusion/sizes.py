"""The published sizes of Stable Diffusion's networks."""

from typing import Any

from ..published import Published, floats
from .controlnet import ControlNet, ControlNetConfig, config_from_unet
from .ip_adapter import IPAdapter, IPAdapterConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

_V2 = {"num_heads": (5, 10, 20, 20), "context_dim": 1024, "linear_projection": True}
_XL = {
    "widths": (320, 640, 1280),
    "layers": (2, 2, 2),
    "attention": (False, True, True),
    "depths": (1, 2, 10),
    "num_heads": (5, 10, 20),
    "context_dim": 2048,
    "linear_projection": True,
    "size_dim": 256,
    "added_dim": 2816,  # 1280 of pooled text, 6 sizes of 256
}
_REFINER = _XL | {
    "widths": (384, 768, 1536, 1536),
    "layers": (2, 2, 2, 2),
    "attention": (False, True, True, False),
    "depths": (4, 4, 4, 4),
    "num_heads": (6, 12, 24, 24),
    "context_dim": 1280,
    "added_dim": 2560,  # 1280 of pooled text, 5 sizes of 256: one of them is an aesthetic score
}
# Fields of the UNet, and the checkpoint that it fits.
UNETS: dict[str, tuple[dict[str, Any], str]] = {
    "1.5": ({"sample_size": 64}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "1.5-inpainting": ({"sample_size": 64, "in_channels": 9}, "stable-diffusion-v1-5/stable-diffusion-inpainting"),
    "2.1": (_V2 | {"sample_size": 96}, "stabilityai/stable-diffusion-2-1"),
    "2.1-base": (_V2 | {"sample_size": 64}, "stabilityai/stable-diffusion-2-1-base"),
    "XL": (_XL | {"up_attention": _XL["attention"], "sample_size": 128}, "stabilityai/stable-diffusion-xl-base-1.0"),
    "XL-refiner": (
        _REFINER | {"up_attention": _REFINER["attention"], "sample_size": 128},
        "stabilityai/stable-diffusion-xl-refiner-1.0",
    ),
}


def unet(variant: str, **fields: Any) -> UNetConfig:
    """The config of a published UNet; `fields` override it."""
    if variant not in UNETS:
        raise ValueError(f"unknown UNet {variant!r}, expected one of {list(UNETS)}")
    return UNetConfig(**UNETS[variant][0] | fields)


def controlnet(variant: str, **fields: Any) -> ControlNetConfig:
    """The config of the published ControlNets of a UNet; `fields` override it."""
    return config_from_unet(unet(variant), **fields)


# Fields of the ControlNet that differ from those of its UNet, and the checkpoint.
CONTROLNETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "1.5": ("1.5", {}, "lllyasviel/control_v11p_sd15_canny"),
    "2.1": ("2.1-base", {}, "thibaud/controlnet-sd21-canny-diffusers"),
    "XL": ("XL", {}, "diffusers/controlnet-canny-sdxl-1.0"),
    "XL-mid": ("XL", {"depths": (0, 0, 1)}, "diffusers/controlnet-canny-sdxl-1.0-mid"),
}

_PATCHES = {"features": 1280}  # of the image encoder's layer before the last
_FACE_LORA = {"projection": "identity", "features": 512, "hidden": 1024, "rank": 128}
# The UNet, fields of the adapter, and the repository that has the file.
IP_ADAPTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ip-adapter_sd15": ("1.5", {}, "h94/IP-Adapter"),
    "ip-adapter-plus_sd15": (
        "1.5",
        _PATCHES | {"projection": "resampler", "tokens": 16, "hidden": 768, "depth": 4},
        "h94/IP-Adapter",
    ),
    "ip-adapter-full-face_sd15": (
        "1.5",
        _PATCHES | {"projection": "mlp", "tokens": 0, "hidden": 1280},
        "h94/IP-Adapter",
    ),
    "ip-adapter_sdxl": ("XL", _PATCHES, "h94/IP-Adapter"),  # of the pooled image: OpenCLIP's bigG has as many channels
    "ip-adapter_sdxl_vit-h": ("XL", {}, "h94/IP-Adapter"),
    "ip-adapter-plus_sdxl_vit-h": (
        "XL",
        _PATCHES | {"projection": "resampler", "tokens": 16, "hidden": 1280, "depth": 4},
        "h94/IP-Adapter",
    ),
    "ip-adapter-faceid_sd15": ("1.5", _FACE_LORA, "h94/IP-Adapter-FaceID"),
    "ip-adapter-faceid-portrait_sd15": ("1.5", _FACE_LORA | {"tokens": 16, "rank": 0}, "h94/IP-Adapter-FaceID"),
    "ip-adapter-faceid_sdxl": ("XL", _FACE_LORA, "h94/IP-Adapter-FaceID"),
} | {
    f"ip-adapter-faceid-plus{version}_{base}": (
        variant,
        _PATCHES
        | {"projection": "identity_resampler", "identity_dim": 512, "hidden": width, "depth": 4, "rank": 128}
        | {"shortcut": version == "v2"},
        "h94/IP-Adapter-FaceID",
    )
    for version, base, variant, width in (
        ("", "sd15", "1.5", 768),
        ("v2", "sd15", "1.5", 768),
        ("v2", "sdxl", "XL", 2048),
    )
}


def ip_adapter(name: str, **fields: Any) -> IPAdapterConfig:
    """The config of a published adapter, by its file's name; `fields` override it."""
    if name not in IP_ADAPTERS:
        raise ValueError(f"unknown IP-Adapter {name!r}, expected one of {list(IP_ADAPTERS)}")
    variant, own, _ = IP_ADAPTERS[name]
    return ip_adapter_for(unet(variant), **own | fields)


def ip_adapter_for(base: UNetConfig, **fields: Any) -> IPAdapterConfig:
    """An adapter that fits a UNet; in the mode "appended" without layers of its own."""
    widths = tuple(width for _, depth, width in base.transformers for _ in range(depth))
    own: dict[str, Any] = {"context_dim": base.context_dim}
    if fields.get("mode") != "appended":
        own["layer_widths"] = widths
    return IPAdapterConfig(**own | fields)


def _conditions(c: Any) -> dict[str, Any]:
    if not c.added_dim:
        return {}
    numbers = 5 if c.added_dim == _REFINER["added_dim"] else 6
    return {"pooled": floats(1, c.added_dim - numbers * c.size_dim), "sizes": floats(1, numbers)}


def _inputs(c: UNetConfig) -> dict[str, Any]:
    side = c.sample_size or 64
    inputs = {"latents": floats(1, side, side, c.in_channels), "timestep": floats()}
    return inputs | {"context": floats(1, 77, c.context_dim), **_conditions(c)}


def _published_unet(variant: str) -> Published:
    checkpoint = f"{UNETS[variant][1]} (unet)"
    return Published(lambda scan: UNet(unet(variant, scan=scan)), _inputs(unet(variant)), checkpoint)


def _published_controlnet(name: str) -> Published:
    variant, fields, checkpoint = CONTROLNETS[name]
    inputs = _inputs(unet(variant))
    side = 8 * inputs["latents"].shape[1]
    return Published(
        lambda scan: ControlNet(controlnet(variant, **fields | {"scan": scan})),
        inputs | {"hint": floats(1, side, side, 3)},
        checkpoint,
    )


def _published_adapter(name: str) -> Published:
    c, (_, _, repository) = ip_adapter(name), IP_ADAPTERS[name]
    patches = () if c.projection in ("linear", "identity") else (257,)
    inputs = {"features": floats(1, 1, *patches, c.features)}
    if c.identity_dim:
        inputs["identity"] = floats(1, 1, c.identity_dim)
    return Published(lambda scan: IPAdapter(c), inputs, f"{repository}: {name}")


def _published_vae(factor: float, side: int, checkpoint: str) -> Published:
    return Published(
        lambda scan: VAE(VAEConfig(scaling_factor=factor)), {"image": floats(1, side, side, 3)}, f"{checkpoint} (vae)"
    )


PUBLISHED = {
    **{f"unet-{variant}": _published_unet(variant) for variant in UNETS},
    "vae": _published_vae(0.18215, 512, f"{UNETS['1.5'][1]}, {UNETS['2.1'][1]}"),
    "vae-XL": _published_vae(0.13025, 1024, UNETS["XL"][1]),
    **{f"controlnet-{name}": _published_controlnet(name) for name in CONTROLNETS},
    **{name: _published_adapter(name) for name in IP_ADAPTERS},
}
