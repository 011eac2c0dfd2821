"""Checkpoints: Orbax, asynchronous and atomic, of the train state, the data position and the config.

A save goes to a temporary directory that is renamed when complete, so a killed run leaves no half checkpoint. What can
still go wrong (a full disk, a bad copy) is found on resume by the inventory of file sizes that each checkpoint holds:
a checkpoint with a missing or misshapen file is set aside with a warning, and the one before it is taken.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from .rules import Tree, flatten, merge, unflatten
from .state import TrainState

INVENTORY = "inventory.json"
DAMAGED = "damaged"  # suffix of the name of a checkpoint that was set aside

logger = logging.getLogger(__name__)


class _InventoriedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's write-then-rename, with an inventory of the files written just before the rename."""

    async def finalize(self) -> None:
        directory = Path(self.get())
        (directory / INVENTORY).write_text(json.dumps(_file_sizes(directory)))
        await super().finalize()


def _file_sizes(directory: Path) -> dict[str, int]:
    """Sizes of the items' files; those at the top of the directory are Orbax's, rewritten while it renames."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.parent != directory)
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        inventory, _ = (json.loads((checkpoint / name).read_text()) for name in (INVENTORY, "_CHECKPOINT_METADATA"))
        if not (checkpoint / "commit_success.txt").stat().st_size:
            return "commit_success.txt is empty"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    sizes = _file_sizes(checkpoint)
    for name, size in inventory.items():
        if sizes.get(name) != size:
            return f"{name} has {sizes.get(name, 'no')} bytes, expected {size}"
    return None


def find_sound(directory: Path) -> tuple[int | None, dict[Path, str]]:
    """The step of the newest sound checkpoint, and the damage of newer ones; ValueError where all are damaged."""
    damage: dict[Path, str] = {}
    steps = [path for path in directory.glob("*") if path.name.isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
        found = find_damage(path)
        if found is None:
            return int(path.name), damage
        damage[path] = found
        logger.warning("checkpoint %s is damaged (%s): taking the one before it", path, found)
    if damage:
        raise ValueError(f"every checkpoint in {directory} is damaged; move them away to start anew")
    return None, damage


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
        self._directory = directory.resolve()
        self.latest, damage = find_sound(self._directory)  # step of the newest checkpoint, None where there is none
        if keep is not None:
            _set_aside(damage)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,
            temporary_path_class=_InventoriedPath,
        )
        self._manager = ocp.CheckpointManager(self._directory, item_names=("state", "data", "config"), options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Starts saving in the background, once the values have left the devices; no-op where the step is saved."""
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data), config=ocp.args.JsonSave(config)
        )
        self._manager.save(step, args=items, force=True)
        self.latest = step

    def wait(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()

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


def _set_aside(damaged: dict[Path, str]) -> None:
    """Renames damaged checkpoints, once all processes have looked at them."""
    multihost_utils.sync_global_devices("checkpoints inspected")
    for path in damaged if jax.process_index() == 0 else ():
        path.rename(path.with_name(f"{path.name}.{DAMAGED}"))
    multihost_utils.sync_global_devices("damaged checkpoints renamed")
