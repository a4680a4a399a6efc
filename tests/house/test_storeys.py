"""Imports only point down: a planted violation must fail the linter, in every direction."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def lint_imports(house: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the copy: PYTHONPATH comes before the editable install's path."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=house,
        env={**os.environ, "PYTHONPATH": str(house / "src")},
        capture_output=True,
        text=True,
    )


def test_the_house_as_it_stands_keeps_its_contracts(copy_house: Callable[[], Path]) -> None:
    done = lint_imports(copy_house())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("methods/axis.py", "from kvlab.platform.graph import Graph"),
        ("methods/axis.py", "import kvlab.db.states"),
        ("methods/axis.py", "import pydantic"),
        ("methods/model.py", "def late() -> None:\n    import ray"),
        ("kernels/attention.py", "import kvlab.methods.axis"),
        ("kernels/attention.py", "import kvlab.platform.graph"),
        ("kernels/attention.py", "import transformers"),
        ("db/states.py", "import kvlab.platform.graph"),
        ("db/states.py", "import kvlab.methods.axis"),
        ("db/states.py", "import kvlab.kernels.attention"),
        ("db/states.py", "import torch"),
    ],
)
def test_a_planted_violation_is_found(copy_house: Callable[[], Path], file: str, line: str) -> None:
    house = copy_house()
    with (house / file).open("a") as planted:
        planted.write(f"\n{line}\n")
    done = lint_imports(house)
    assert done.returncode == 1, done.stdout
    assert file.removesuffix(".py").replace("/", ".") in done.stdout
