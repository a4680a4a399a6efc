"""What `make` would do: which lock it takes, and when it installs again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def would_do(folder: Path, *arguments: str, path: Path | None = None) -> str:
    """Return the commands that make would run; `path` comes first on PATH."""
    found = os.environ["PATH"] if path is None else f"{path}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["make", "-n", "-C", folder, *arguments],
        env={**os.environ, "PATH": found},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A folder with what make reads, and no .venv."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for source in (repository / "Makefile", repository / "pyproject.toml"):
        shutil.copy(source, folder)
    for lock in repository.glob("constraints-*.txt"):
        shutil.copy(lock, folder)
    return folder


def test_the_lock_follows_the_gpu(copy: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    answers = tools / "nvidia-smi"
    answers.write_text("#!/bin/sh\nexit 1\n")
    answers.chmod(0o755)
    assert "-c constraints-cpu.txt -e" in would_do(copy, "setup", path=tools)
    answers.write_text("#!/bin/sh\nexit 0\n")
    assert "-c constraints-cuda.txt -e" in would_do(copy, "setup", path=tools)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "kvlab run workflows/quickstart.yaml"),
        ("test", "python -m pytest"),
        ("lint", "lint-imports"),
        ("bench", "python -m kvlab.platform.bench --json bench.json"),
        ("bench-gpu", "python -m kvlab.platform.bench --gpu --json bench-gpu.json"),
    ],
)
def test_every_target_sets_up_first(copy: Path, target: str, command: str) -> None:
    first, _, rest = would_do(copy, target).partition("pip install")
    assert "-m venv" in first
    assert command in rest


def test_it_installs_again_only_after_a_change(copy: Path) -> None:
    stamp = next(
        word
        for word in would_do(copy, "setup").split()
        if word.startswith(".venv/.ready-") and not word.endswith("*")
    )
    (copy / ".venv").mkdir()
    (copy / stamp).touch()
    assert "pip install" not in would_do(copy, "test")
    with (copy / "pyproject.toml").open("a") as project:
        project.write("# changed\n")
    assert "pip install" in would_do(copy, "test")


def test_ci_runs_lint_and_tests(repository: Path) -> None:
    script = repository / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert lines.index("make lint") < lines.index("make test")
