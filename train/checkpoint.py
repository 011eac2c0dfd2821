"""Checkpoints: Orbax, asynchronous and atomic, of the train state, the data position and the config.

A save goes to a temporary directory that is renamed when complete, so a killed run leaves no half checkpoint; in a
bucket, which knows no renaming, it is complete when the file COMMITTED, written last, is there. What can still go wrong
(a full disk, a bad copy, a flipped bit) is found on resume by the inventory that each checkpoint holds, the SHA-256 of
its every file (in a bucket the store's own checksums, so that nothing is read twice): a checkpoint with a missing,
changed or additional file is set aside with a warning, and the one before it is taken. Values that are not finite are
never saved.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ..storage.paths import files_below, folder_names, is_local
from .processes import on_first
from .rules import Tree, flatten, merge, unflatten
from .state import TrainState

INVENTORY = "inventory.json"
COMMITTED = "commit_success.txt"  # Orbax reads it where a file system has no rename
DAMAGED = "damaged"  # suffix of the name of a checkpoint that was set aside

logger = logging.getLogger(__name__)


class _InventoriedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's write-then-rename, with an inventory of a checkpoint's files written just before the rename.

    Orbax writes each item of a checkpoint (state, data, config) to such a path too; these have no inventory.
    """

    async def finalize(self) -> None:
        if not self.get_final().name.isdecimal():
            return await super().finalize()
        directory = Path(self.get())
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        (directory / COMMITTED).write_text(f"step {self.get_final().name} is complete\n")
        write_inventory(directory, int(self.get_final().name))
        directory.rename(self.get_final())


class _CommittedPath(ocp.path.atomicity.CommitFileTemporaryPath):
    """The same in a bucket: written in place, then the inventory, and last the file that says it is complete."""

    async def finalize(self) -> None:
        if not self.get_final().name.isdecimal():
            return await super().finalize()
        directory = cast(Path, self.get_final())
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        write_inventory(directory, int(directory.name))
        (directory / COMMITTED).write_text(f"step {directory.name} is complete\n")


def write_inventory(checkpoint: Path, step: int) -> None:
    """Lists every file of a checkpoint with its SHA-256, and guards the list by its own."""
    listed = {"step": step, "files": _checksums(checkpoint)}
    text = json.dumps(listed, sort_keys=True)
    (checkpoint / INVENTORY).write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()} | listed))


def _checksums(directory: Path) -> dict[str, str]:
    """Checksums by relative name of every file but the inventory, and but the mark that follows it in a bucket."""
    if not is_local(directory):
        found = files_below(directory)
        return {name: f"crc32c {found[name]['crc32c']}" for name in sorted(found.keys() - {INVENTORY, COMMITTED})}
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / INVENTORY]
    with ThreadPoolExecutor() as threads:  # hashing and reading both release the interpreter's lock
        checksums = threads.map(_checksum, files)
        return {str(path.relative_to(directory)): checksum for path, checksum in zip(files, checksums, strict=True)}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None; reads all of them."""
    try:
        inventory = json.loads((checkpoint / INVENTORY).read_text())
        expected = inventory.pop("sha256")
        if hashlib.sha256(json.dumps(inventory, sort_keys=True).encode()).hexdigest() != expected:
            return f"{INVENTORY} was changed"
        if inventory["step"] != int(checkpoint.name):
            return f"it holds step {inventory['step']}"
        found = _checksums(checkpoint)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        return f"{INVENTORY}: {type(error).__name__}: {str(error)[:200]}"
    for name, checksum in inventory["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != checksum:
            return f"{name} was changed"
    added = sorted(found.keys() - inventory["files"].keys())
    return f"{added[0]} was added" if added else None


def find_sound(directory: Path) -> tuple[int | None, dict[Path, str]]:
    """The step of the newest sound checkpoint, and the damage of newer ones; ValueError where all are damaged.

    Called by all processes, of which the first looks.
    """

    def find() -> tuple[int | None, dict[str, str]]:
        damage: dict[str, str] = {}
        names = folder_names(directory) if directory.is_dir() else []
        steps = [directory / name for name in names if name.isdecimal()]
        if not is_local(directory):  # a killed run leaves one that is not complete, which Orbax overwrites
            steps = [path for path in steps if (path / COMMITTED).exists()]
        for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
            found = find_damage(path)
            if found is None:
                return int(path.name), damage
            damage[path.name] = found
            logger.warning("checkpoint %s is damaged (%s): taking the one before it", path, found)
        if damage:
            first = "; ".join(f"{name}: {found}" for name, found in list(damage.items())[:3])
            raise ValueError(f"every checkpoint in {directory} is damaged ({first}); move them away to start anew")
        return None, damage

    latest, damage = on_first(find)
    return latest, {directory / name: found for name, found in damage.items()}


@jax.jit
def _finite_leaves(state: TrainState) -> list[Array]:
    """One bool for each leaf; integers are always finite."""
    leaves = jax.tree.leaves(state)
    return [jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True) for x in leaves]


def check_finite(step: int, state: TrainState) -> None:
    """FloatingPointError that names the first arrays with a value that is not finite."""
    finite = jax.device_get(_finite_leaves(state))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]
    bad = [path for path, good in zip(paths, finite, strict=True) if not good]
    if bad:
        raise FloatingPointError(
            f"at step {step} {len(bad)} arrays of the state are not finite, among them {', '.join(bad[:3])}: not saved"
        )


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds."""

    state: TrainState
    data: dict[str, Any]
    config: dict[str, Any]


class Checkpointer:
    """The checkpoints of one directory; a context manager, so that the last save is complete on leaving.

    `keep` is the number of newest checkpoints to keep; None opens the directory of another run for reading only.
    """

    def __init__(self, directory: Path, keep: int | None) -> None:
        local = is_local(directory)
        if not local and not str(directory).startswith("gs://"):
            raise ValueError(f"checkpoints are written to local folders and gs:// buckets, got {directory}")
        self._directory = directory.resolve() if local else directory
        self.latest, damage = find_sound(self._directory)  # step of the newest checkpoint, None where there is none
        if keep is not None:
            _set_aside(damage)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,
            temporary_path_class=_InventoriedPath if local else _CommittedPath,
        )
        self._manager = ocp.CheckpointManager(self._directory, item_names=("state", "data", "config"), options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Starts saving in the background, once the values have left the devices; no-op where the step is saved.

        FloatingPointError where a value is not finite.
        """
        if step == self.latest:
            return
        check_finite(step, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(config)
        )
        self._manager.save(step, args=items, force=True)
        self.latest = step

    def wait(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()

    def read_config(self) -> dict[str, Any]:
        """The config that the newest checkpoint was made with."""
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return cast(Any, self._manager.restore(self.latest, args=args)).config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the newest checkpoint's arrays by path, as `array_shapes` of its state."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree: Any = reader.metadata(self._directory / str(self.latest) / "state").item_metadata
        return array_shapes(tree.tree)

    def restore(self, abstract_state: TrainState) -> Restored:
        """The newest checkpoint, on the shardings of `abstract_state`, whatever devices and processes wrote it."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore()
        )
        restored: Any = self._manager.restore(self.latest, args=items)
        return Restored(restored.state, restored.data, restored.config)

    def restore_params(self, abstract_params: Tree) -> Tree:
        """The parameters alone (averaged where the run kept an average), of whatever shapes they were saved with.

        A parameter with the path and shape of one in `abstract_params` comes with its sharding, others replicated.
        """
        wanted = flatten(abstract_params)
        replicated = NamedSharding(next(iter(wanted.values())).sharding.mesh, PartitionSpec())

        def target(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
            like = wanted.get(name)
            sharding = like.sharding if like is not None and like.shape == leaf.shape else replicated
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        path = self._directory / str(self.latest) / "state"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree: Any = reader.metadata(path).item_metadata
            item = {
                part: unflatten({name: target(name, leaf) for name, leaf in flatten(tree[part]).items()})
                for part in ("params", "ema")
            }
            restore_args = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
            restored = reader.restore(path, args=args)
        return merge(restored["params"], restored["ema"])


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path, for nested dicts and for pytrees alike."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _set_aside(damaged: dict[Path, str]) -> None:
    """Renames damaged checkpoints, once all processes have looked at them; one set aside before keeps its name."""
    multihost_utils.sync_global_devices("checkpoints inspected")
    for path in damaged if jax.process_index() == 0 else ():
        taken = os.path.lexists if is_local(path) else type(path).exists
        names = (
            f"{path.name}.{DAMAGED}{suffix}" for suffix in itertools.chain([""], (f".{i}" for i in itertools.count(2)))
        )
        path.rename(next(free for name in names if not taken(free := path.with_name(name))))
    multihost_utils.sync_global_devices("damaged checkpoints renamed")
