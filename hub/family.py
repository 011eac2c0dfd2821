"""What a family of models gives `hub`: one record, from which loading, saving and describing follow."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ..kernels.activations import ACTIVATIONS
from .bundle import Bundle
from .files.placement import Layout, Tree, placed
from .files.source import Source
from .files.tensors import TensorFile, nearest
from .keys import Section, brief
from .mapping import Table, load_params

Overrides = Mapping[str, Any]
_SCANNED_DEPTH = 256  # files that stack their layers have fewer tensors than layers


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller of `hub.load` asks for besides the checkpoint."""

    dtype: DTypeLike | None = None  # of the parameters and of what the model computes in
    mesh: Mesh | None = None
    layout: Layout | None = None
    overrides: Overrides = dataclasses.field(default_factory=dict)  # fields of the model's config

    @property
    def compute_dtype(self) -> np.dtype:
        """float32 unless another is asked for: parameters may well lie in half precision."""
        return jnp.dtype(jnp.float32 if self.dtype is None else self.dtype)

    def placed(self, shapes: Tree) -> Tree:
        """Abstract parameters with the sharding that is asked for."""
        return placed(shapes, self.mesh, self.layout)

    def cast(self, params: Tree) -> Tree:
        """In the dtype that is asked for, if any: what is made of a file's tensors is float32."""
        if self.dtype is None:
            return params
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

    def read(self, file: TensorFile, table: Table, shapes: Tree) -> Tree:
        """The parameters in `file`, each straight in its place."""
        return load_params(file, table, self.placed(shapes), dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config is known, as its family passes it on."""

    source: Source
    format: str
    config: Any  # of the model that the tensors are read into
    options: Options


def fields_of(config: Any) -> Collection[str]:
    """The fields of a config, which is what most families let be overridden."""
    return [field.name for field in dataclasses.fields(config)]


# Fields of configs that leave the function as it is: training, initial values, layout in memory; how positions follow
# images of another size, each library's own rule; the token of masked patches, which only training has; and the
# size of the latents that a UNet was trained on.
_NO_FUNCTION = {
    "attention_dropout",
    *("dropout", "drop_path", "drop_path_uniform", "patch_dropout", "init", "init_std", "token_std", "head_bias_init"),
    *("logit_scale_init", "scan", "remat", "pos_interpolation", "mask_token"),
    "sample_size",
}
_INITIAL = {"layer_scale", "logit_bias_init"}  # initial values of parameters that None leaves out


def differences(expected: Any, got: Any, prefix: str = "") -> list[str]:
    """The fields in which two configs stand for different functions, in words."""
    if type(expected) is not type(got):
        return [f"{prefix or 'a '}{type(expected).__name__}: reads as {type(got).__name__}"]
    found: list[str] = []
    for field in dataclasses.fields(expected):
        a, b = getattr(expected, field.name), getattr(got, field.name)
        if dataclasses.is_dataclass(a):
            found += differences(a, b, f"{prefix}{field.name}.")
        elif field.name not in _NO_FUNCTION and _meaning(field.name, a) != _meaning(field.name, b):
            found.append(f"{prefix}{field.name}={brief(a)}, reads as {brief(b)}")
    return found


def _meaning(name: str, value: Any) -> Any:
    if name in _INITIAL:
        return value is None
    return ACTIVATIONS.get(value, value) if name.endswith("activation") else value


def check_depth(config: Any, file: TensorFile) -> None:
    """ValueError where a config has more layers than its file has tensors: tracing them would take forever."""
    if not dataclasses.is_dataclass(config):
        return
    depth = getattr(config, "depth", 0)
    if depth > max(len(file), _SCANNED_DEPTH):
        raise ValueError(f"{file.path}: its config has {depth} layers, expected at most its {len(file)} tensors")
    for field in dataclasses.fields(config):
        check_depth(getattr(config, field.name), file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The models that share a config, with their published formats.

    `hub.load` asks every family to `recognise` a checkpoint, has the first that does `read` its config, makes `shapes`
    and `table` of it, reads the tensors, and hands them to `bundle`. `hub.save` goes by the type of the config.
    """

    name: str  # as messages say it
    config: type | tuple[type, ...]  # what `bundle.config` may be
    formats: tuple[str, ...]
    recognise: Callable[[Source], str | None]  # the format of a checkpoint of this family, None for all others
    # (source, format, overrides) -> the config that the tensors were made with, and the overrides that leave them alone
    read: Callable[[Source, str, Overrides], Any]
    table: Callable[[Source, str, Any], Table]
    shapes: Callable[[Source, Any], Tree]  # abstract parameters of a config
    bundle: Callable[[Checkpoint, Tree], Bundle]  # applies the overrides that change parameters: sizes, classes
    save: Callable[[Bundle, Path, str, int], None]  # (bundle, path, format, largest shard in bytes)
    settings: Callable[[Any], Collection[str]] = fields_of  # config -> names that may be overridden
    # (config, format) -> the config of the same function in the form in which the format stores it
    stored: Callable[[Any, str], Any] = lambda config, format: config
    # (config, format) -> overrides that its files never say and its reader never guesses: whoever loads them gives them
    unsaid: Callable[[Any, str], Overrides] = lambda config, format: {}
    keys: Mapping[str, Section] = dataclasses.field(default_factory=dict)  # of its JSON files, by title

    def describe(self, source: Source, format: str, overrides: Overrides) -> tuple[Any, Table, Tree]:
        """Config, table and abstract parameters of a checkpoint; nothing of its tensors is read.

        Raises ValueError where its files, or the overrides, do not describe a model of this family.
        """
        try:
            config = self.read(source, format, overrides)
            check_depth(config, source.tensors)
            known = self.settings(config)
            for name in overrides:
                if name not in known:
                    raise ValueError(f"unknown field {name!r} of {type(config).__name__}{nearest(name, known)}")
            return config, self.table(source, format, config), self.shapes(source, config)
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:  # values that no published config has
            path = source.tensors.path
            raise ValueError(f"{path}: its config.json does not describe a {self.name} ({error!r})") from error

    def load(self, source: Source, format: str, options: Options) -> Bundle:
        """The checkpoint that `recognise` found to be of `format`. See `omnax.hub.load`."""
        config, table, shapes = self.describe(source, format, options.overrides)
        params = options.read(source.tensors, table, shapes)
        return self.bundle(Checkpoint(source, format, config, options), params)
