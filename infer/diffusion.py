"""Stable Diffusion as it lies in a directory of components: networks, tokenisers, sampler; from prompts to pictures."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import hub
from ..data.preprocess import build
from ..data.text.bpe import BytePairTokenizer, TextTokenizer, load_tokenizer
from ..data.text.tokens import Overflow
from ..hub.components import Index, open_index
from ..hub.files.source import fetch
from ..hub.keys import brief
from ..hub.samplers import FILE, read_sampler
from ..models.samplers import SamplerConfig, Schedule
from ..models.stable_diffusion.controlnet import ControlNet
from ..models.stable_diffusion.ip_adapter import IPAdapter, append, check_base, place
from ..models.stable_diffusion.pipeline import ControlImage, Guidance, Pipeline, Prompt, TextEncoders

# OpenAI's statistics, by which every published image encoder of an adapter sees pixels.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TEXTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """The networks with their parameters, and what makes inputs of texts and images."""

    pipeline: Pipeline
    params: Mapping[str, Any]  # of "unet" and "vae"
    control_params: tuple[Any, ...]
    text: TextEncoders
    text_params: tuple[Any, ...]
    tokenizers: tuple[TextTokenizer, ...]
    scheduler: Mapping[str, Any]  # scheduler_config.json
    zero_negative: bool  # no negative prompt is zeros, not an empty text (SDXL)
    adapter: hub.Bundle | None = None
    image_encoder: hub.Bundle | None = None

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        return self.pipeline.vae.config.factor if self.pipeline.vae else 1

    def size(self, asked: Sequence[int] | None = None) -> tuple[int, int]:
        """Rows and columns of a picture; ValueError for sizes that do not fall into whole latents."""
        side = self.factor * (self.pipeline.unet.config.sample_size or 64)
        rows, columns = asked or (side, side)
        if min(rows, columns) < self.factor or rows % self.factor or columns % self.factor:
            raise ValueError(f"size is {rows} x {columns} pixels, expected multiples of {self.factor}")
        return rows, columns

    def sampler(self, kind: str = "", **fields: Any) -> SamplerConfig:
        """The checkpoint's sampler, or another one on its noise schedule."""
        return dataclasses.replace(read_sampler(self.scheduler, kind), **fields)

    def prompt(
        self, texts: Sequence[str], size: tuple[int, int], skip: int = 0, overflow: Overflow = "truncate"
    ) -> Prompt:
        """What the UNet is told by texts; ValueError for a text that is too long where `overflow` is "error"."""
        rows = [tokenizer(list(texts), overflow=overflow) for tokenizer in self.tokenizers]
        context, pooled = _encode(self.text, self.text_params, tuple(map(jnp.asarray, rows)), skip)
        if not self.pipeline.unet.config.added_dim:
            return Prompt(context)
        sizes = jnp.tile(jnp.array([[*size, 0, 0, *size]], jnp.float32), (len(texts), 1))
        return Prompt(context, pooled, sizes)

    def negative(self, text: str | None, size: tuple[int, int], skip: int = 0) -> Prompt:
        """What guidance leads away from: one row."""
        prompt = self.prompt([text or ""], size, skip)
        if text is None and self.zero_negative and prompt.pooled is not None:
            return dataclasses.replace(prompt, context=0 * prompt.context, pooled=0 * prompt.pooled)
        return prompt

    def cut(self, text: str) -> str:
        """The end of a text that does not fit into the tokeniser's rows; "" where all does."""
        tokenizer = self.tokenizers[0]
        assert isinstance(tokenizer, BytePairTokenizer)
        ids = tokenizer.encode(text)[tokenizer.context_length - 2 :]  # beside start and end
        return tokenizer.decode(ids).strip() if ids else ""

    def noise(self, keys: Array, size: tuple[int, int]) -> Float[Array, "B X Y C"]:
        """The noise that each key begins with."""
        shape = (*(side // self.factor for side in size), self.pipeline.unet.config.in_channels)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def tokens_of(self, pictures: Sequence[np.ndarray]) -> Any:
        """The adapter's output for uint8 pictures: a row without any image, and a row with all of them."""
        assert self.adapter is not None and self.image_encoder is not None
        side = self.image_encoder.config.trunk.image_size
        steps = build(
            [
                ("resize_shortest", {"size": min(side), "method": "pil_bicubic"}),
                ("center_crop", {"size": side}),
                ("normalize", {"mean": _MEAN, "std": _STD}),
            ]
        )
        pixels = np.stack([steps({"image": picture}, np.random.default_rng(0))["image"] for picture in pictures])
        return _image_tokens(self.image_encoder.model, self.adapter.model, *self._image_params(), pixels)

    def _image_params(self) -> tuple[Any, Any]:
        assert self.adapter is not None and self.image_encoder is not None
        return self.image_encoder.params, self.adapter.params

    def draw(
        self,
        schedule: Schedule,
        prompt: Prompt,
        negative: Prompt | None,
        keys: Array,
        noise: Array,
        *,
        guidance: float = 7.5,
        rescale: float = 0.0,
        hints: Sequence[tuple[np.ndarray, Sequence[float]]] = (),
        guess_mode: bool = False,
        image_tokens: Any = None,
        image_scale: float = 1.0,
        picture: np.ndarray | None = None,
        progress: Callable[[int], None] | None = None,
        decode: bool = True,
    ) -> Array:
        """Pictures [B, X, Y, 3] in [-1, 1], one run of one program.

        `negative` is one row, or None for no guidance; `hints` are a control image [X, Y, 3] in [0, 1] and its scales
        over the steps for every ControlNet; `picture` [X, Y, 3] in [-1, 1] is drawn on from.
        """
        batch = len(prompt.context)
        copies = functools.partial(jax.tree.map, lambda x: jnp.repeat(x, batch, 0))
        images = None
        if image_tokens is not None and self.adapter is not None:
            if self.adapter.config.mode == "appended":
                without, shown = (jax.tree.map(lambda x, i=i: x[i : i + 1], image_tokens) for i in (0, 1))
                prompt = dataclasses.replace(prompt, context=append(prompt.context, copies(shown)))
                if negative:
                    negative = dataclasses.replace(negative, context=append(negative.context, without))
            else:
                rows = copies(image_tokens if negative else jax.tree.map(lambda x: x[1:], image_tokens))
                images = place(self.pipeline.unet.config, self.adapter.config, rows, image_scale)
        controls = [
            ControlImage(params, jnp.repeat(hint[None], batch, 0), jnp.asarray(scales, jnp.float32))
            for params, (hint, scales) in zip(self.control_params, hints, strict=True)
        ]
        return _draw(
            dataclasses.replace(self.pipeline, guess_mode=guess_mode, progress=progress),
            self.params,
            schedule,
            prompt,
            keys,
            noise,
            Guidance(copies(negative), guidance, rescale) if negative else Guidance(),
            controls,
            images,
            None if picture is None else jnp.repeat(picture[None], batch, 0),
            decode,
        )


@functools.partial(jax.jit, static_argnums=(0, 10))
def _draw(
    pipeline: Pipeline,
    params: Any,
    schedule: Schedule,
    prompt: Prompt,
    keys: Array,
    noise: Array,
    guidance: Guidance,
    controls: Any,
    images: Any,
    picture: Array | None,
    decode: bool,
) -> Array:
    more = {"guidance": guidance, "controls": controls, "images": images, "picture": picture, "decode": decode}
    return pipeline.draw(params, schedule, prompt, keys, noise=noise, **more)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(text: TextEncoders, params: Any, tokens: Any, skip: int) -> tuple[Array, Array | None]:
    return text(params, tokens, skip)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _image_tokens(encoder: Any, adapter: Any, encoder_params: Any, params: Any, pixels: Array) -> Any:
    """Of no image the first adapters see an embedding of zeros, the others zero pixels."""
    pooled = adapter.config.projection == "linear"
    rows = pixels if pooled else jnp.concatenate([0 * pixels, pixels])
    out = encoder.apply({"params": encoder_params}, rows, hidden_states=not pooled)
    features = out["projected"] if pooled else out["hidden_states"][-2]
    features = jnp.concatenate([0 * features, features]) if pooled else features
    return adapter.apply({"params": params}, features.reshape(2, len(pixels), *features.shape[1:]))


def load_diffusion(
    weights: str | Path,
    *,
    dtype: DTypeLike | None = None,
    controlnets: Sequence[str] = (),
    adapter: str = "",
    image_encoder: str = "",
    num_controls: int = 0,
) -> Diffusion:
    """Reads the components that drawing needs; others (a safety checker) are left alone.

    `num_controls` ControlNets are those given, or the directory's own. ValueError for a directory of another kind, for
    networks that do not fit each other, and for another number of ControlNets.
    """
    index = open_index(fetch(weights))
    if index is None:
        raise ValueError(
            f"{weights} has no model_index.json, expected a directory of components as diffusers writes it"
        )
    folders = index.folders
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        if name not in folders:
            raise ValueError(f"{weights} has no component {name!r}, which drawing needs; it has {folders}")
    load = functools.partial(_component, index, dtype)
    unet, vae = load("unet"), load("vae") if "vae" in folders else None
    texts = [(load(text), tokenizer) for text, tokenizer in _TEXTS if text in folders]
    tokenizers = [load_tokenizer(index.directory / name) for _, name in texts]
    nets = [hub.load(path, dtype=dtype) for path in controlnets]
    if num_controls and not nets and "controlnet" in folders:
        nets = [load("controlnet")]
    if len(nets) != num_controls:
        raise ValueError(f"{num_controls} control images for {len(nets)} ControlNets, expected one for each")
    _check_controls(unet, nets)
    bundle = hub.load(adapter, dtype=dtype) if adapter else None
    if bundle is not None:
        if not isinstance(bundle.model, IPAdapter) or bundle.model.config.projection.startswith("identity"):
            raise ValueError(f"{adapter} is no IP-Adapter that sees images, but a {type(bundle.model).__name__}")
        check_base(unet.config, bundle.config)
        if not image_encoder and "image_encoder" not in folders:
            raise ValueError(
                f"{weights} has no component 'image_encoder', which the adapter needs: give --image-encoder"
            )
    return Diffusion(
        Pipeline(unet.model, vae.model if vae else None, tuple(net.model for net in nets)),  # type: ignore[arg-type]
        {"unet": unet.params} | ({"vae": vae.params} if vae else {}),
        tuple(net.params for net in nets),
        TextEncoders(tuple(text.model for text, _ in texts), bool(unet.config.added_dim)),  # type: ignore[arg-type]
        tuple(text.params for text, _ in texts),
        tuple(tokenizers),
        json.loads((index.directory / "scheduler" / FILE).read_bytes()),
        bool(index.document.get("force_zeros_for_empty_prompt", False)),
        bundle,
        (hub.load(image_encoder, dtype=dtype) if image_encoder else load("image_encoder")) if bundle else None,
    )


def _component(index: Index, dtype: DTypeLike | None, name: str) -> hub.Bundle:
    try:
        return hub.load(index.directory / name, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"component {name!r}: {error}") from error


def _check_controls(unet: hub.Bundle, nets: Sequence[hub.Bundle]) -> None:
    """ValueError for a ControlNet of another base model than the UNet."""
    for net in nets:
        if not isinstance(net.model, ControlNet):
            raise ValueError(f"expected a ControlNet, got a {type(net.model).__name__}")
        for field in ("widths", "context_dim", "added_dim", "layers"):
            got, expected = getattr(net.config, field), getattr(unet.config, field)
            if got != expected:
                raise ValueError(
                    f"a ControlNet of another base model: {field} is {brief(got)}, expected {brief(expected)}"
                )
