"""`python -m omnax.train.export --config configs/vit.py --workdir runs/vit --out DIR`: a trained model as published.

Writes the format of the model's family, which `omnax.hub.load` and the published libraries read. The parameters are the
averaged ones, where an average was kept. Config and its overrides are those of the training command.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from .. import hub
from ..hub.processor import without_images
from ..storage.paths import as_path
from ..storage.writing import check_output
from .checkpoint import Checkpointer
from .main import add_common_arguments, make_recipe, parse_overrides, report_errors
from .program import make_program
from .recipe import Recipe
from .settings import RunConfig
from .sharding import make_mesh
from .start import CHECKPOINTS


def export(
    config: RunConfig, recipe: Recipe, workdir: Path, out: Path, format: str | None = None, preprocessing: bool = True
) -> None:
    """Writes the newest sound checkpoint of `workdir` to `out`; ValueError where there is none, or no format for it.

    With the preprocessing of evaluation, unless `preprocessing` is false.
    """
    check_output(out, folder=out.is_dir() or not out.suffix)
    if recipe.bundle is None:
        raise ValueError(f"recipe {config.recipe!r} has no published format")
    if recipe.class_names:
        recipe.class_names()  # opens the data: what is missing is found before the checkpoint is read
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpointer(workdir / CHECKPOINTS, keep=None) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"{str(workdir)!r} holds no checkpoint of a run")
        params = checkpoints.restore_params(make_program(recipe, config, mesh).state.params)
        bundle = recipe.bundle(params)
        if not preprocessing:
            bundle = dataclasses.replace(bundle, processor=without_images(bundle.processor))
        hub.save(bundle, out, format)
        print(f"step {checkpoints.latest} of {workdir}: {out}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m omnax.train.export", epilog="Settings: --config.key.key=value")
    add_common_arguments(parser)
    parser.add_argument("--workdir", required=True, type=as_path, help="the run")
    parser.add_argument("--out", required=True, type=as_path, help="directory or file to write")
    parser.add_argument("--format", help="one of the family's formats; default: the one that holds the model as it is")
    parser.add_argument(
        "--without-preprocessing",
        action="store_true",
        help="write nothing of how images were resized for evaluation, for formats that have no word for it",
    )
    flags, rest = parser.parse_known_args(arguments)

    def run() -> None:
        config, recipe = make_recipe(flags.config, parse_overrides(rest))
        export(config, recipe, flags.workdir, flags.out, flags.format, not flags.without_preprocessing)

    return report_errors(run, flags.debug)


if __name__ == "__main__":
    sys.exit(main())
