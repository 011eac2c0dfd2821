"""Wav2Lip in its published phases: the lip-sync expert, then the generator against it, with or without a GAN.

The parameters of a run are those of its networks by name ("expert"; "generator", "expert", "discriminator") with their
batch statistics (`norm/mean`, `norm/var`): no player trains these, but they load, save and start other runs like all
else. A step's new statistics leave a loss as `variables` and are put back after the update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .... import hub
from ....data import pipeline
from ....data.drawn import talking_faces
from ....data.images.transforms import Example
from ....data.lookup import lookup
from ....data.prefetch import process_shard
from ....data.sources import Source
from ....hub.families.wav2lip import NETWORKS, abstract, join, network_name, split
from ....models.ranges import Count, Fraction, Integer, NonNegative, Workers
from ....models.wav2lip import Wav2LipConfig, initial_values, num_forward_flops
from ....storage.paths import as_path, glob
from ...optimizer import OptimizerConfig
from ...recipe import Evaluator, Player, Recipe
from ...rules import Tree
from ...settings import RunConfig, dtype_of
from ...sharding import batch_sharding
from ...state import TrainState
from .lip_sync import Evaluation, Losses, Networks, draw, keep_statistics

STAGES = ("expert", "generator")
STATISTICS = r".*/norm/(mean|var)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips: "drawn" faces (see data/drawn/talking_faces.py), or "folder", a prepared folder of real ones."""

    name: str = "drawn"
    path: str = ""  # of "folder"
    identities: str = "many"  # of "drawn", or "one"
    train_clips: Count = 32  # of "drawn"
    test_clips: Count = 8
    windows_per_clip: Count = 8  # of the held-out clips, in an evaluation
    threads: Count = 8
    workers: Workers = 0  # -1: one for each core this process may use

    def open(self, split: str) -> Source:
        """The clips of "train" or "test"."""
        if self.name == "drawn":
            count, seed = (self.train_clips, 0) if split == "train" else (self.test_clips, 1)
            return talking_faces.DrawnFaces(count, seed=seed, identities=self.identities)
        if self.name != "folder":
            raise ValueError(f"data.name is {self.name!r}, expected 'drawn' or 'folder'")
        return talking_faces.FaceClips(as_path(self.path), split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `wav2lip`."""

    stage: str
    model: Wav2LipConfig = dataclasses.field(default_factory=Wav2LipConfig)
    dtype: str = "float32"  # of the convolutions
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig  # of every player
    sync_weight: Fraction = 0.0
    sync_below: NonNegative = 0.75  # the sync weight is 0 until an evaluation finds less sync loss than this
    adversarial_weight: Fraction = 0.0  # 0: no discriminator
    batch_statistics: bool = False  # of the frozen expert; True: as the published trainer leaves it
    train_expert: bool = False  # the notes' two discriminators: the expert is trained against the generator
    crop: str = "face"  # "mouth": crops show the lower half of the box only, and nothing of the target is seen
    mel_offset: Integer = -1  # video frames from a frame to the start of the sound it is trained with
    evaluators: tuple[str, ...] = ("sync",)  # also, for the generator: "cross_audio" (drawn faces), "lse"

    def __post_init__(self) -> None:
        if self.stage not in STAGES or self.crop not in ("face", "mouth"):
            raise ValueError(
                f"stage is {self.stage!r} of {STAGES}, crop {self.crop!r} of ('face', 'mouth'): expected one of these"
            )
        if self.accumulation != 1:
            raise ValueError("batch statistics are of whole batches: accumulation must be 1")
        if self.stage == "generator" and self.sync_weight and "sync" not in self.evaluators:
            raise ValueError(
                f"sync_weight {self.sync_weight} waits for the evaluator 'sync', evaluators are {self.evaluators}"
            )
        if self.ema is not None:
            raise ValueError("the players of a GAN keep no averages: ema must be None")

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks of this stage."""
        if self.stage == "expert":
            return ("expert",)
        return ("generator", "expert", *(["discriminator"] if self.adversarial_weight else []))


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    dtype = dtype_of(config.dtype)
    modules = {name: NETWORKS[name].model(config.model, dtype=dtype) for name in config.networks}
    masked_from = config.model.image_size // 2 if config.crop == "face" else 0
    networks = Networks(modules, masked_from)
    losses = Losses(networks, config.adversarial_weight, config.batch_statistics)
    players = make_players(config, losses)

    def init(rng: Array) -> tuple[Tree, Tree]:
        keys = dict(zip(config.networks, jax.random.split(rng, len(config.networks)), strict=True))
        params = {name: initial_values(keys[name], abstract(name, config.model)) for name in config.networks}
        learning = [player.parameters.removesuffix("/.*") for player in players]
        variables: Tree = {"statistics": {name: split(params[name])[1] for name in learning if name != "discriminator"}}
        if config.stage == "generator":
            variables["sync_weight"] = jnp.float32(0.0)
        return params, variables

    return Recipe(
        init=init,
        players=players,
        sharding=((r".*", "auto"),),
        batch=batch_shapes(config),
        data=train_batches(config),
        evaluators=make_evaluators(config, networks),
        inspect=lambda: config.data.open("test"),
        after_update=keep_statistics,
        after_evaluation=switch_sync(config) if config.stage == "generator" else None,
        load=lambda path: load(path, config),
        bundle=lambda params: bundle(config.networks[0], modules, params, config.model),
        flops_per_step=num_flops(config),
        pictures=draw,
    )


def make_players(config: Config, losses: Losses) -> tuple[Player, ...]:
    """The expert alone; or the generator, then the discriminators that learn from what it made."""
    optimizer = config.optimizer
    normalised = dataclasses.replace(optimizer, trainable=((STATISTICS, False), (".*", True)))
    expert = Player(losses.expert, normalised, parameters="expert/.*")
    if config.stage == "expert":
        return (expert,)
    players = [Player(losses.generator, normalised, "generator", "generator/.*")]
    if config.adversarial_weight:
        players.append(Player(losses.discriminator, optimizer, "discriminator", "discriminator/.*"))
    if config.train_expert:
        players.append(Player(losses.trained_expert, normalised, "expert", "expert/.*"))
    return tuple(players)


def switch_sync(config: Config) -> Callable[[TrainState, dict[str, dict[str, float]]], TrainState]:
    """Gives the sync term its weight, for good, after an evaluation with less sync loss than `config.sync_below`."""

    def after_evaluation(state: TrainState, results: dict[str, dict[str, float]]) -> TrainState:
        old = state.variables["sync_weight"]
        if float(old) or not config.sync_weight or not results["sync"]["sync"] < config.sync_below:
            return state
        weight = jax.device_put(jnp.float32(config.sync_weight), old.sharding)
        return state.replace(variables=state.variables | {"sync_weight": weight})

    return after_evaluation


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch: what `sample_pair` or `sample_window` give."""
    c, shape = config.model, jax.ShapeDtypeStruct
    clip = shape((config.batch_size, c.clip_len, c.image_size, c.image_size, 3), jnp.uint8)
    mel = shape((config.batch_size, 80, c.mel_steps, 1), jnp.float32)
    if config.stage == "expert":
        return {"frames": clip, "mel": mel, "label": shape((config.batch_size,), jnp.float32)}
    mels = shape((config.batch_size, c.clip_len, 80, 16, 1), jnp.float32)
    return {"target": clip, "reference": clip, "mel": mel, "mels": mels}


def make_sample(config: Config) -> Callable[[Example, np.random.Generator], Example]:
    """Clip -> one example."""
    length, size, crop = config.model.clip_len, config.model.image_size, config.crop
    options = {} if config.stage == "expert" else {"mel_offset": config.mel_offset}
    draw_one = talking_faces.sample_pair if config.stage == "expert" else talking_faces.sample_window

    def sample(clip: Example, rng: np.random.Generator) -> Example:  # without `config`, which workers would import
        clip = clip | {"frames": talking_faces.Resized(clip["frames"], size, crop)}
        return draw_one(clip, rng, length=length, **options)

    return sample


def train_batches(config: Config) -> Callable[[Any], pipeline.Batches]:
    """`open(shard)` for the recipe's `data`: endless windows of the training clips in random order."""

    def open_shard(shard: tuple[int, int]) -> pipeline.Batches:
        stream = pipeline.Stream(config.data.open("train"), make_sample(config))
        reading = pipeline.Reading(shard, config.data.threads, config.data.workers)
        return pipeline.train([stream], batch_size=config.batch_size, seed=config.seed, reading=reading)

    return open_shard


def test_batches(config: Config) -> pipeline.Batches:
    """A pass over `windows_per_clip` windows of each held-out clip, the same in every evaluation."""
    repeated = talking_faces.Repeated(config.data.open("test"), config.data.windows_per_clip)
    shard = process_shard(batch_sharding(jax.sharding.get_mesh()), config.batch_size)
    reading = pipeline.Reading(shard, config.data.threads, config.data.workers)
    stream = pipeline.Stream(repeated, make_sample(config))
    return pipeline.evaluate(stream, batch_size=config.batch_size, reading=reading)


def make_evaluators(config: Config, networks: Networks) -> tuple[Evaluator, ...]:
    """The evaluators that the config names."""
    evaluation = Evaluation(
        networks,
        batches=lambda: test_batches(config),
        clips=lambda: config.data.open("test"),
        length=config.model.clip_len,
        batch_statistics=config.batch_statistics,
    )
    makers = {
        "sync": evaluation.windows,
        "cross_audio": evaluation.cross_audio,
        "lse": evaluation.lip_sync_error,
    }
    return tuple(Evaluator(name, lookup(makers, name, "evaluator")) for name in config.evaluators)


def load(path: str, config: Config) -> Tree:
    """Published files: one .pth, or a folder whose files hold one network each."""
    folder = as_path(path)
    files = glob(folder / "*.pth") if folder.is_dir() else [folder]
    params: Tree = {}
    for file in files:
        bundle = hub.load(file)
        name = network_name(bundle.model)
        if name in params:
            raise ValueError(f"{folder} holds two files of the network {name!r}, expected one of each")
        params[name] = join(bundle.params, bundle.variables.get("batch_stats", {}))
    return {name: tree for name, tree in params.items() if name in config.networks}


def bundle(name: str, modules: dict[str, nn.Module], params: Tree, model: Wav2LipConfig) -> hub.Bundle:
    """One network of a run, ready to be saved: the generator, or in the first phase the expert."""
    own, statistics = split(params[name])
    return hub.Bundle(modules[name], own, model, format="torch", variables={"batch_stats": statistics})


def num_flops(config: Config) -> float:
    """Of one step, forward and backward (twice the forward), with the parts that this config trains."""
    expert, generator, discriminator = (
        num_forward_flops(name, config.model) for name in ("expert", "generator", "discriminator")
    )
    if config.stage == "expert":
        return 3.0 * config.batch_size * expert
    frames = config.batch_size * config.model.clip_len
    # The frozen expert passes gradients on to the faces: two of three products. The discriminator does so for its
    # generator, then learns from real and generated faces.
    adversarial = (2 + 6) * discriminator if config.adversarial_weight else 0.0
    return frames * (3 * generator + adversarial) + config.batch_size * 2 * expert
