"""The traps of the layout stay closed: shadowed names, files seen twice, paths of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

LONGEST = 400
MACHINE_PATH = re.compile(rb"(?<![\w.])/(work|farm|tmp|root|opt/(wheels|pypi))/")


def test_platform_is_no_package_of_its_own(repository: Path) -> None:
    assert not (repository / "platform/__init__.py").exists()


def test_the_standard_platform_module_wins_from_the_root(repository: Path) -> None:
    found = subprocess.run(
        # -c puts the working directory at the head of sys.path.
        [sys.executable, "-c", "import platform; print(platform.__file__)"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert Path(found.strip()).parent == Path(sysconfig.get_path("stdlib"))


def test_no_package_marker_under_tests(repository: Path) -> None:
    assert not list((repository / "tests").rglob("__init__.py"))


def test_the_import_name_is_four_links(repository: Path) -> None:
    links = {p.name: p.readlink() for p in (repository / "src/kvlab").iterdir() if p.is_symlink()}
    assert links == {
        name: Path("../..") / name for name in ("platform", "methods", "kernels", "db")
    }


def test_ruff_sees_every_file_once(repository: Path, storey_files: list[Path]) -> None:
    listed = subprocess.run(
        [Path(sys.executable).with_name("ruff"), "check", "--show-files", "."],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    seen = [Path(line).resolve() for line in listed if line.endswith(".py")]
    assert len(seen) == len(set(seen))
    assert {repository / file for file in storey_files} <= set(seen)


def test_no_file_is_too_long(repository: Path, tracked: list[Path]) -> None:
    sources = [f for f in tracked if f.suffix in {".py", ".yaml", ".md"} or f.name == "Makefile"]
    lengths = {f: len(f.read_text().splitlines()) for f in sources}
    assert not {str(f.relative_to(repository)): n for f, n in lengths.items() if n > LONGEST}


def test_no_path_of_one_machine(repository: Path, tracked: list[Path]) -> None:
    found = [
        f"{file.relative_to(repository)}: {match.group().decode()}"
        for file in tracked
        if (match := MACHINE_PATH.search(file.read_bytes()))
    ]
    assert not found
