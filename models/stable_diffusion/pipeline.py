"""From text to image: the networks of Stable Diffusion as one function of arrays, the sampling loop inside.

Reference: diffusers pipelines/{stable_diffusion,stable_diffusion_xl,controlnet}. Pictures are NHWC in [-1, 1].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ...kernels.diffusion import guide
from ...kernels.normalization import layer_norm
from ..clip import TextTower
from ..samplers import Schedule, sample
from .controlnet import ControlNet, add_controls
from .unet import Control, Images, UNet
from .vae import VAE

Tree = Mapping[str, Any]


@flax.struct.dataclass
class Prompt:
    """What the UNet is told: hidden states of the text; of SDXL also the pooled text and the sizes."""

    context: Float[Array, "B S D"]
    pooled: Float[Array, "B P"] | None = None
    sizes: Num[Array, "B 6"] | None = None

    @property
    def added(self) -> dict[str, Array]:
        """The keyword arguments that SDXL's networks take, {} for others."""
        return {} if self.pooled is None else {"pooled": self.pooled, "sizes": self.sizes}  # type: ignore[dict-item]


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The text towers of a checkpoint, one, or SDXL's two, and which of their hidden states is the context."""

    towers: tuple[TextTower, ...]
    penultimate: bool = False  # SDXL: the last block's input, without the final norm

    def __call__(
        self, params: Sequence[Tree], tokens: Sequence[Int[Array, "B T"]], skip: int = 0
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"] | None]:
        """Context and, of SDXL, pooled text. `skip` leaves out so many of the last blocks ("CLIP skip").

        ValueError for more of them than a tower has.
        """
        states, pooled = [], None
        for tower, own, ids in zip(self.towers, params, tokens, strict=True):
            back = skip + self.penultimate
            if not 0 <= back < tower.config.depth:
                raise ValueError(f"skip is {skip}, expected 0 to {tower.config.depth - 1 - self.penultimate}")
            out: Any = tower.apply({"params": own}, ids, hidden_states=bool(back))
            hidden = out["hidden_states"][-1 - back] if back else out["tokens"]
            if back and not self.penultimate:
                norm = own["norm"]
                hidden = layer_norm(hidden, norm["scale"], norm["bias"], tower.config.eps)
            states.append(hidden)
            pooled = out["projected"] if self.penultimate else None  # the last tower's
        return jnp.concatenate(states, -1), pooled


@flax.struct.dataclass
class Guidance:
    """Classifier-free guidance away from `negative`; without one the prompt's prediction is taken as it is."""

    negative: Prompt | None = None
    scale: Float[Array, ""] | float = 7.5
    rescale: Float[Array, ""] | float = 0.0


@flax.struct.dataclass
class ControlImage:
    """A ControlNet's parameters and image, and its scale at every step of the schedule."""

    params: Tree
    hint: Float[Array, "B X Y C"]
    scale: Float[Array, " N"]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The networks, without their parameters; `draw` is to be jitted with the pipeline static."""

    unet: UNet
    vae: VAE | None = None  # None: the UNet works on pixels
    controlnets: tuple[ControlNet, ...] = ()
    guess_mode: bool = False  # the ControlNets see the conditional half alone, and weigh fine residuals less
    progress: Callable[[int], None] | None = None  # is told the number of every step that begins

    def draw(
        self,
        params: Tree,
        schedule: Schedule,
        prompt: Prompt,
        keys: Array,
        *,
        noise: Float[Array, "B X Y C"],
        guidance: Guidance | None = None,
        controls: Sequence[ControlImage] = (),
        images: Images | None = None,
        picture: Float[Array, "B X2 Y2 3"] | None = None,
        decode: bool = True,
    ) -> Float[Array, "B X2 Y2 3"]:
        """Pictures, or latents without `decode`; `params` are those of "unet" and "vae", `keys` one an example.

        `images` are of the batch [negative, prompt] where there is guidance. A `picture` is drawn on from (image to
        image): `schedule` then is one that starts later.
        """
        model = self.predictor(params["unet"], prompt, guidance or Guidance(), controls, images)

        def fresh(i: Array) -> Array:
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), noise.shape[1:]))(keys)

        begin = picture
        if picture is not None and self.vae is not None:
            begin = self.vae.apply({"params": params["vae"]}, picture, method=VAE.encode_scaled)
        latents = sample(schedule, model, noise, fresh, begin)  # type: ignore[arg-type]  # apply's type says nothing
        if self.vae is None or not decode:
            return latents
        return self.vae.apply({"params": params["vae"]}, latents, method=VAE.decode_scaled)  # type: ignore[return-value]

    def predictor(
        self,
        params: Tree,
        prompt: Prompt,
        guidance: Guidance,
        controls: Sequence[ControlImage] = (),
        images: Images | None = None,
    ) -> Callable[[Array, Array, Array], Array]:
        """`model(x, t, i)` for the sampling loop: guided, controlled. Hints are encoded here, once for all steps."""
        negative = guidance.negative
        everything = prompt if negative is None else _both(negative, prompt)
        control = self._control(prompt, everything, controls)

        def model(x: Array, t: Array, i: Array) -> Array:
            if self.progress is not None:
                jax.debug.callback(self.progress, i)
            latents = x if negative is None else jnp.concatenate([x, x])
            more: Any = {**everything.added, "control": control(x, t, i), "images": images}
            out: Any = self.unet.apply({"params": params}, latents, t, everything.context, **more)
            if negative is None:
                return out
            unconditional, conditional = jnp.split(out.astype(jnp.float32), 2)
            return guide(unconditional, conditional, guidance.scale, guidance.rescale)

        return model

    def _control(
        self, prompt: Prompt, everything: Prompt, controls: Sequence[ControlImage]
    ) -> Callable[[Array, Array, Array], Control | None]:
        """`control(x, t, i)` of all ControlNets together, for the UNet's batch; None where there are none."""
        pairs = list(zip(self.controlnets, controls, strict=True))
        encode: Any = ControlNet.encode_hint
        features: list[Any] = [net.apply({"params": c.params}, c.hint, method=encode) for net, c in pairs]
        guided = everything is not prompt

        def control(x: Array, t: Array, i: Array) -> Control | None:
            found = []
            for (net, given), hint in zip(pairs, features, strict=True):
                conditional = guided and (self.guess_mode or net.config.global_pool)
                more: Any = {"scale": given.scale[i], "guess_mode": self.guess_mode}
                text, copies = (prompt, 1) if conditional or not guided else (everything, 2)
                residuals: Any = net.apply(
                    {"params": given.params},
                    jnp.concatenate([x] * copies),
                    t,
                    text.context,
                    hint_features=jnp.concatenate([hint] * copies),
                    **text.added,
                    **more,
                )
                if conditional:
                    residuals = jax.tree.map(lambda r: jnp.concatenate([jnp.zeros_like(r), r]), residuals)
                found.append(residuals)
            return add_controls(found) if found else None

        return control


def _both(first: Prompt, second: Prompt) -> Prompt:
    """The batch of one prompt before that of another."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def control_scales(scale: float, steps: int, start: float = 0.0, end: float = 1.0) -> list[float]:
    """A ControlNet's scale at each of so many steps: 0 before the share `start` of them, and after the share `end`."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"control begins at {start} and ends at {end} of the steps, expected 0 <= start < end <= 1")
    return [0.0 if i / steps < start or (i + 1) / steps > end else scale for i in range(steps)]
