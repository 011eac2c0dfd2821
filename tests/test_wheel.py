"""The wheel, as a user gets it: built, installed into an empty environment, every module imported."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs in the new environment, from an empty folder: nothing of the checkout is on its path. Packages of extras are
# absent there, so a module that needs one must import it only when it is used.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import omnax
names = [m.name for m in pkgutil.walk_packages(omnax.__path__, "omnax.") if not m.name.endswith("__main__")]
for name in sorted(names):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # benchmarks beside the published libraries need those: the test extra
        assert name.startswith("omnax.benchmarks.") and error.name in {"torch", "transformers", "timm"}, error
banned = {"torch", "tensorflow", "transformers", "timm"} & set(sys.modules)
assert not banned, banned
assert not any(name.split(".")[0] in {"models", "train", "data", "hub", "kernels", "configs"} for name in sys.modules)
print(len(names))
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_installs_alone_and_imports(tmp_path):
    source = tmp_path / "source"
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(lambda name: name and (ROOT / name).is_file(), tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", source)
    (wheel,) = (tmp_path / "dist").glob("omnax-*.whl")
    assert all(name.startswith(("omnax/", "omnax-")) for name in zipfile.ZipFile(wheel).namelist())
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # Without bytecode of all that is installed: importing makes what it needs.
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt", wheel)
    elsewhere = ("tests/", "notebooks/", "docs/")
    modules = sum(1 for name in tracked if name.endswith(".py") and not name.startswith(elsewhere))
    imported = int(run(python, "-c", IMPORT_EVERYTHING, cwd=tmp_path, env={"PATH": "", "JAX_PLATFORMS": "cpu"}))
    assert 20 < imported <= modules
