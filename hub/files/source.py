"""Where a checkpoint comes from: a path, or a repository of the Hugging Face hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage.paths import as_path
from .documents import read_json
from .readers import open_tensors
from .tensors import TensorFile, nearest

_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".h5", ".json")  # never the end of a repository's id

COMPILED = "_orig_mod."  # what torch.compile puts before every name
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint and the JSON files beside them; `config` is empty without one."""

    tensors: TensorFile
    config: dict[str, Any]
    preprocessor: dict[str, Any]  # file name -> content of those of PROCESSOR_FILES that are there

    @property
    def directory(self) -> Path:
        """Where the files beside the tensors lie."""
        return self.tensors.path if self.tensors.path.is_dir() else self.tensors.path.parent

    @property
    def where(self) -> str:
        """The place of `config`, as messages name it."""
        return str(self.directory / "config.json")


def fetch(path_or_repo_id: str | Path) -> Path:
    """A path as it is; the id of a hub repository becomes the path of its local copy. ValueError if neither exists."""
    path = as_path(path_or_repo_id)
    return path if path.exists() else _fetch(str(path_or_repo_id))


def open_source(path: Path) -> Source:
    """Opens a directory or a file of tensors with the JSON files of its directory; ValueError for anything else."""
    directory = path if path.is_dir() else path.parent
    tensors = open_tensors(path)
    if any(name.startswith(COMPILED) for name in tensors):
        tensors = tensors.renamed([(f"^{re.escape(COMPILED)}", "")])
    processors = {name: content for name in PROCESSOR_FILES if (content := read_json(directory / name))}
    return Source(tensors, read_json(directory / "config.json"), processors)


def _fetch(repo_id: str) -> Path:
    """The local snapshot of a hub repository: its safetensors, or where it has none, its other weights."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id) or repo_id.endswith(_FILES):
        siblings = (str(file) for file in as_path(repo_id).parent.glob("*"))
        raise ValueError(
            f"no such file or directory: {repo_id!r}{nearest(repo_id, siblings)}; "
            "expected the path of a checkpoint, or the id of a hub repository, as in 'google/vit-base-patch16-224'"
        )
    from huggingface_hub import snapshot_download  # only here: nothing else needs a network

    try:
        path = Path(
            snapshot_download(repo_id, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"])
        )
        if not any(path.rglob("*.safetensors")):
            snapshot_download(repo_id, allow_patterns=["*.bin", "*.pth", "*.pt", "*.npz"])
    except Exception as error:  # offline, no such repository, no access: all the same to the caller
        raise ValueError(
            f"there is no path {repo_id!r}, and no such repository could be fetched from the hub: {error}"
        ) from error
    return path
