"""What the house tests look at: the repository itself, and copies of it to plant mistakes in."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

STOREYS = ("platform", "methods", "kernels", "db")


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tracked(repository: Path) -> list[Path]:
    """Every file that git tracks or would add; links are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [repository / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


@pytest.fixture(scope="session")
def storey_files(repository: Path) -> list[Path]:
    """Every Python file of the four storeys, relative to the repository."""
    return sorted(
        file.relative_to(repository)
        for storey in STOREYS
        for file in (repository / storey).rglob("*.py")
    )


@pytest.fixture
def copy_house(repository: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that copies what is needed to lint and to build, links kept as links."""

    def copy() -> Path:
        house = tmp_path / "house"
        house.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(repository / name, house)
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for name in (*STOREYS, "src"):
            shutil.copytree(repository / name, house / name, symlinks=True, ignore=ignored)
        return house

    return copy
