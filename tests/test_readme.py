"""The commands of the README, run as they stand, in order, in an empty folder (what needs data or hardware says so)."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE_CELL = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_commands_run_as_they_stand(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XLA_FLAGS": ""}
    lines = [
        line.partition(" #")[0] for block in blocks("bash") for line in block.splitlines() if "# needs" not in line
    ]
    commands = [line for line in lines if not line.startswith(("make ", "pip "))]
    assert len(commands) >= 5
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(1, 10) (1, 4, 4, 64)" in done.stdout


def test_the_two_commands_are_targets_and_ci_is_one_of_them():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


def test_every_cell_of_the_status_table_names_a_test_that_exists():
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.partition("## Status")[2].splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        for cell in row.strip("|").split("|")[1:]:
            for path, name in TABLE_CELL.findall(cell):
                assert (ROOT / path).is_file(), path
                assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"
            assert "✓" not in cell or TABLE_CELL.search(cell), f"no test is named for {cell!r}"
