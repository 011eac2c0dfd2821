"""Shared test set-up: eight virtual CPU devices, a persistent compilation cache, shape checks at trace time."""

import importlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# XLA ends the process when a device waits 40 s for the others; eight of them may share one busy core here.
_FLAGS = " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _FLAGS
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("OMNAX_DATA_DIR", str(ROOT / ".cache" / "data"))

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402  (the flags above must be set before jax is imported)

install_import_hook(["omnax.kernels", "omnax.objectives"], "beartype.beartype")


# The files that take longest begin first: two processes share the tests file by file, and the last one to end counts.
LONGEST = ("train/test_wav2lip", "train/test_dinov2", "train/test_clip", "train/test_qwen_vl", "train/test_blip2")


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.nodeid.partition(".py")[0].removeprefix("tests/")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Where there are no oracles on purpose (.ci/newest_python), tests that want one are skipped."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if os.environ.get("OMNAX_WITHOUT_ORACLES") and error.name in ("torch", "transformers", "timm", "ott"):
            pytest.skip(f"without {error.name}")
        raise


@pytest.fixture(scope="session")
def bucket():
    """A store in whose bucket every `gs://` path of this process and its children lies (object_store.py)."""
    fsspec, object_store = importlib.import_module("fsspec"), importlib.import_module("object_store")
    with object_store.serving() as store:
        os.environ.update(store.environment)
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield store
        for name in store.environment:
            del os.environ[name]
