"""Lip-sync networks in training and evaluation: their losses as players, and measurements on held-out clips."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float
from matplotlib.figure import Figure
from PIL import Image

from ....data.drawn.talking_faces import FPS, correlation, openness
from ....data.images.transforms import Example
from ....data.media.audio import MEL_RATE, mel_windows, window_starts, write_wav
from ....data.media.video import write_video
from ....data.sources import Source
from ....hub.families.wav2lip import join, split
from ....models.wav2lip import lower_half, stack_frames
from ....objectives import lip_sync
from ....storage.writing import staged
from ...evaluation.host import over, replicated
from ...evaluation.pictures import draw_curves, save
from ...metrics import read_metrics
from ...recipe import Batch, Terms
from ...rules import Tree
from ...state import TrainState

Result = tuple[Array, tuple[Terms, Tree]]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a run by name, over one tree of parameters that holds their batch statistics too."""

    modules: dict[str, nn.Module]
    masked_from: int  # first row of the target that the generator does not see

    def apply(self, name: str, params: Tree, *inputs: Array, train: bool = False) -> tuple[Any, Tree]:
        """(output, new batch statistics) of one network; in evaluation the statistics are empty."""
        own, statistics = split(params[name])
        options: dict[str, Any] = {} if name == "discriminator" else {"train": train}
        module, variables = self.modules[name], {"params": own, "batch_stats": statistics}
        if not train:
            return module.apply(variables, *inputs, **options), {}
        out, new = module.apply(variables, *inputs, **options, mutable=["batch_stats"])
        return out, dict(new["batch_stats"])

    def generate(self, params: Tree, batch: Batch, *, train: bool) -> tuple[Float[Array, "B T X Y 3"], Tree]:
        """Faces for "mels" with the pose of "target" and the looks of "reference"."""
        target, reference = unit(batch["target"]), unit(batch["reference"])
        masked = target.at[:, :, self.masked_from :].set(0.0)
        return self.apply("generator", params, batch["mels"], jnp.concatenate([masked, reference], -1), train=train)

    def sync(
        self,
        params: Tree,
        mel: Float[Array, "B M S 1"],
        clip: Float[Array, "B T X Y 3"],
        label: Float[Array, " B"],
        *,
        train: bool,
        mask: Bool[Array, " B"] | None = None,
    ) -> tuple[Array, Terms, Tree]:
        """The expert's loss on clips and sounds; with `train` from the statistics of this batch."""
        out, statistics = self.apply("expert", params, mel, stack_frames(lower_half(clip)), train=train)
        total, terms = lip_sync.sync_loss(out["audio"], out["face"], label, mask=mask)
        return total, terms, statistics

    def real(self, params: Tree, clip: Float[Array, "B T X Y 3"]) -> Float[Array, " BT"]:
        """The discriminator's logits, frame by frame."""
        frames = lower_half(clip)
        return self.apply("discriminator", params, frames.reshape(-1, *frames.shape[2:]))[0]


def unit(frames: Array) -> Array:
    """uint8 -> float32 in [0, 1]."""
    return frames.astype(jnp.float32) / 255.0


@dataclasses.dataclass(frozen=True)
class Losses:
    """The players' losses. The weight of the sync term is in the state's variables: an evaluation switches it on."""

    networks: Networks
    adversarial_weight: float
    batch_statistics: bool  # the frozen expert normalises by the batch, as the published trainer leaves it

    def expert(self, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
        """Phase 1: do these five faces and this sound belong together?"""
        clip = unit(batch["frames"])
        total, terms, new = self.networks.sync(params, batch["mel"], clip, batch["label"], train=True)
        return total, ({"accuracy": terms["accuracy"]}, with_statistics(state.variables, expert=new))

    def generator(self, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
        """Phase 2: reconstruction, synchrony by the expert, and fooling the discriminator if there is one."""
        generated, new = self.networks.generate(params, batch, train=True)
        _, terms = lip_sync.reconstruction_loss(generated, unit(batch["target"]))
        weight = state.variables["sync_weight"]

        def sync(generated: Array) -> Array:
            ones = jnp.ones(len(generated))
            return self.networks.sync(params, batch["mel"], generated, ones, train=self.batch_statistics)[0]

        terms["sync"] = jax.lax.cond(weight > 0, sync, lambda generated: jnp.float32(0.0), generated)
        if self.adversarial_weight:
            terms["adversarial"] = lip_sync.adversarial_loss(self.networks.real(params, generated), real=True)
        total, terms = lip_sync.generator_loss(terms, sync_weight=weight, adversarial_weight=self.adversarial_weight)
        return total, (terms | {"sync_weight": weight}, with_statistics(state.variables, generator=new))

    def discriminator(self, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
        """Real faces against those of the generator before this step's move (the compiler shares its forward pass)."""
        generated, _ = self.networks.generate(state.params, batch, train=True)
        fake = self.networks.real(params, jax.lax.stop_gradient(generated))
        terms = {
            "real": lip_sync.adversarial_loss(self.networks.real(params, unit(batch["target"])), real=True),
            "fake": lip_sync.adversarial_loss(fake, real=False),
        }
        return terms["real"] + terms["fake"], (terms, state.variables)

    def trained_expert(self, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
        """The notes' second discriminator: the expert goes on learning, with generated mouths as out of sync."""
        generated, _ = self.networks.generate(state.params, batch, train=True)
        clips = [unit(batch["target"]), unit(batch["reference"]), jax.lax.stop_gradient(generated)]
        mel, label = jnp.tile(batch["mel"], (3, 1, 1, 1)), jnp.repeat(jnp.array([1.0, 0.0, 0.0]), len(generated))
        total, terms, new = self.networks.sync(params, mel, jnp.concatenate(clips), label, train=True)
        return total, ({"accuracy": terms["accuracy"]}, with_statistics(state.variables, expert=new))


def with_statistics(variables: Tree, **new: Tree) -> Tree:
    """The variables with the new batch statistics of some networks."""
    return variables | {"statistics": variables["statistics"] | new}


def keep_statistics(state: TrainState) -> TrainState:
    """Puts the batch statistics that the losses gave out back beside the parameters."""
    new = {name: join(state.params[name], tree) for name, tree in state.variables["statistics"].items()}
    return state.replace(params=state.params | new)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Measurements on held-out clips: on windows in batches, and on whole clips. Each compiles once in a run."""

    networks: Networks
    batches: Callable[[], Iterable[dict[str, np.ndarray]]]  # a pass over windows, in this process's rows
    clips: Callable[[], Source]
    length: int  # frames of the expert's window
    batch_statistics: bool

    def windows(self, state: TrainState) -> dict[str, float | np.ndarray]:
        """Means over all windows: the expert's loss ("sync") and accuracy, or the generator's "sync" and "l1"."""
        terms, counts = zip(*over(self._jitted_terms, state, self.batches), strict=True)
        return {name: float(np.average([term[name] for term in terms], weights=counts)) for name in terms[0]}

    @functools.cached_property
    def _jitted_terms(self) -> Callable[[Tree, Tree, Batch], tuple[Terms, Array]]:
        return replicated(lambda params, variables, batch: (self._terms(params, batch), batch["mask"].sum()))

    def _terms(self, params: Tree, batch: Batch) -> Terms:
        mask = batch["mask"]
        if "generator" not in self.networks.modules:
            frames = unit(batch["frames"])
            return self.networks.sync(params, batch["mel"], frames, batch["label"], train=False, mask=mask)[1]
        generated, _ = self.networks.generate(params, batch, train=False)
        ones, train = jnp.ones(len(generated)), self.batch_statistics
        total, _, _ = self.networks.sync(params, batch["mel"], generated, ones, train=train, mask=mask)
        return {"sync": total} | lip_sync.reconstruction_loss(generated, unit(batch["target"]), mask=mask)[1]

    def cross_audio(self, state: TrainState) -> dict[str, float | np.ndarray]:
        """Does the mouth follow a strange sound? r of its openness with that sound's envelope, mean over the clips.

        For drawn faces, which have an "envelope". Arrays: the clips' frames, what was made of them, and the sounds.
        """
        clips = self.clips()
        sources, results, scores, sounds = [], [], [], []
        for i in range(len(clips)):
            face, voice = clips[i], clips[(i + 1) % len(clips)]
            sources.append(np.stack(list(face["frames"])))
            results.append(np.asarray(self._jitted_generate(state.averaged_params, *self._inputs(face, voice))))
            scores.append(correlation(openness(results[-1]), voice["envelope"]))
            sounds.append(voice["audio"])
        frames = {"source": np.stack(sources), "generated": np.stack(results), "sound": np.stack(sounds)}
        return {"r": float(np.mean(scores)), **frames}

    def lip_sync_error(self, state: TrainState) -> dict[str, float | np.ndarray]:
        """LSE-D and LSE-C of clips driven by their own sound, by this run's expert (the paper has another network)."""
        clips = self.clips()
        steps = round(self.length * MEL_RATE / FPS)
        found = []
        for i in range(len(clips)):
            frames, mels = self._inputs(clips[i], clips[i])
            starts = np.arange(len(frames) - self.length + 1) * MEL_RATE // FPS
            sound = mel_windows(clips[i]["mel"], starts, steps)
            found.append(jax.device_get(self._jitted_errors(state.averaged_params, frames, mels, sound)))
        return {key: float(np.mean([error[key] for error in found])) for key in found[0]}

    def _inputs(self, face: Example, voice: Example) -> tuple[np.ndarray, np.ndarray]:
        """All frames of a clip [T, X, Y, 3], and for each the window of a sound [T, 80, 16, 1]."""
        frames = np.stack(list(face["frames"]))
        starts = window_starts(voice["mel"].shape[1], FPS, len(frames))
        return frames, mel_windows(voice["mel"], starts)

    @functools.cached_property
    def _jitted_generate(self) -> Callable[..., Array]:
        return replicated(self._generate)

    @functools.cached_property
    def _jitted_errors(self) -> Callable[..., Terms]:
        return replicated(self._errors)

    def _generate(self, params: Tree, frames: Array, mels: Array) -> Array:
        """The clip as its own reference, as in inference -> uint8."""
        batch = {"target": frames[None], "reference": frames[None], "mels": mels[None]}
        generated, _ = self.networks.generate(params, batch, train=False)
        return jnp.rint(255 * generated[0]).astype(jnp.uint8)

    def _errors(self, params: Tree, frames: Array, mels: Array, sound: Array) -> Terms:
        generated = unit(self._generate(params, frames, mels))
        windows = jnp.stack([generated[i : i + self.length] for i in range(len(sound))])
        out, _ = self.networks.apply("expert", params, sound, stack_frames(lower_half(windows)))
        return lip_sync.lip_sync_error(lip_sync.lse_distances(out["face"], out["audio"]))


def draw(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """training.png: curves; contact_sheet.png and side_by_side.mp4: held-out faces beside what was made of them."""
    lines = read_metrics(workdir)
    names = ("loss", "l1", "sync", "accuracy", "r", "real", "fake", "lse_c")
    shown = [name for name in names if any(key.endswith(f"/{name}") for line in lines for key in line)]
    figure = Figure(figsize=(5 * len(shown), 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw_curves(axes, lines, name)
    paths = [workdir / "training.png"]
    save(figure, paths[0])
    if "cross_audio" not in results:
        return paths
    measured = results["cross_audio"]
    source, generated = (measured[name][..., ::-1] for name in ("source", "generated"))  # BGR -> RGB
    pairs = np.concatenate([source, generated], axis=2)  # clip, frame, original above generated
    sheet = rearrange(pairs[:, ::8], "n t x y c -> (n x) (t y) c")
    paths.append(workdir / "contact_sheet.png")
    with staged(paths[-1]) as file:
        Image.fromarray(sheet).save(file)
    beside = rearrange(np.concatenate([source, generated], axis=3), "n t x y c -> (n t) x y c")
    paths.append(workdir / "side_by_side.mp4")
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch) / "sound.wav"
        write_wav(sound, measured["sound"].reshape(-1))
        write_video(paths[-1], beside, Fraction(FPS), audio=sound)
    return paths
