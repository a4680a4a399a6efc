"""What a run will meet on this machine: each check says what it found and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import kvlab
from kvlab import KvlabError
from kvlab.platform.home import Home, try_write

Level = Literal["ok", "warn", "fail"]

GIB = 2**30
LITTLE_DISK = 5 * GIB
"""Below this a workflow with checkpoints may fill the disk."""
LITTLE_MEMORY = 4 * GIB
"""Below this Ray's own processes leave little for a job."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `kvlab doctor`.

    Attributes:
        name: what was looked at. found: what it is.
        level: `warn` works but not as one may expect; `fail` stops a run.
        advice: what to do; empty where all is well.
    """

    name: str
    level: Level
    found: str
    advice: str = ""


def examine(home: Home) -> list[Finding]:
    """Look at everything a local run needs. Changes nothing, and leaves no file."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check(home))
        except KvlabError as error:
            findings.append(Finding(check.__name__, "fail", str(error)))
    return findings


def python(home: Home) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{found} at {sys.executable}")


def torch(home: Home) -> Iterator[Finding]:
    try:
        import torch as library
    except ImportError as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", "run `make setup`")
        return
    yield Finding("torch", "ok", library.__version__)
    names = [
        f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        for properties in map(
            library.cuda.get_device_properties, range(library.cuda.device_count())
        )
    ]
    driver = _driver()
    if names:
        found = f"{'; '.join(names)} (driver {driver or 'unknown'})"
        yield Finding("devices", "ok", found)
    elif driver:
        yield Finding(
            "devices",
            "warn",
            f"driver {driver} is there, but torch {library.__version__} sees no GPU",
            "install torch's CUDA build: rm -r .venv && make setup",
        )
    else:
        yield Finding("devices", "ok", "no GPU: jobs run on the CPU")


def _driver() -> str | None:
    """The NVIDIA driver's version, or None where there is no working one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def machine(home: Home) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        yield Finding("cores", "warn", str(cores), "jobs and the controller share one core")
    else:
        yield Finding("cores", "ok", str(cores))
    total, available = _memory()
    found = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}"
    if available < LITTLE_MEMORY:
        yield Finding("memory", "warn", found, "close other programs, or expect out-of-memory ends")
    else:
        yield Finding("memory", "ok", found)


def _memory() -> tuple[int, int]:
    """Total and available bytes of the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    facts = Path("/proc/meminfo")
    if facts.exists():
        # Free pages alone leave out what the page cache would give back.
        match = re.search(r"^MemAvailable:\s+(\d+) kB", facts.read_text(), flags=re.MULTILINE)
        available = int(match[1]) * 1024 if match else available
    return total, available


def disk(home: Home) -> Iterator[Finding]:
    place = next(folder for folder in (home.root, *home.root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {home.root}"
    try:
        _try_make(home.root, place)
    except OSError as error:
        found = f"{home.root} cannot be written ({error.strerror})"
        yield Finding("home", "fail", found, "set KVLAB_HOME to a folder of yours")
        return
    if free < LITTLE_DISK:
        yield Finding("home", "warn", found, "free some space, or set KVLAB_HOME elsewhere")
    else:
        yield Finding("home", "ok", found)


def _try_make(root: Path, there: Path) -> None:
    """Write in the home, or make a folder beside where it would be; leaves nothing."""
    if root == there:
        try_write(root)
    else:
        Path(tempfile.mkdtemp(dir=there)).rmdir()


def ray(home: Home) -> Iterator[Finding]:
    try:
        import ray as library
    except ImportError as error:
        yield Finding("ray", "fail", f"cannot be imported: {error}", "run `make setup`")
        return
    yield Finding("ray", "ok", library.__version__)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("ray auth", "ok", "no cluster named: kvlab starts Ray on this machine alone")
        return
    from kvlab.platform.controller.access import refuse_open_cluster

    try:
        refuse_open_cluster(address)
    except KvlabError as error:
        yield Finding("ray auth", "fail", str(error))
    else:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        yield Finding("ray auth", "ok", f"cluster at {address}, RAY_AUTH_MODE {mode}")


def store(home: Home) -> Iterator[Finding]:
    from kvlab.db import engine, url, versions
    from kvlab.db.errors import StoreError

    address = url.parse(home.url)
    place = url.shown(address)
    if address.get_backend_name() == "sqlite" and not url.path_of(address).exists():
        yield Finding("store", "ok", f"{place}: none yet, the first run makes it")
        return
    try:
        connected = engine.connect(address, read_only=True)
        try:
            with engine.told(address), engine.reading(connected).connect() as connection:
                versions.check(connection, place)
        finally:
            connected.dispose()
    except StoreError as error:
        yield Finding("store", "fail", str(error))
    else:
        yield Finding("store", "ok", f"{place}: version {versions.HEAD}, current")


def tracking(home: Home) -> Iterator[Finding]:
    file = home.root / "mlflow.db"
    version = _version("mlflow")
    if version is None:
        yield Finding("mlflow", "fail", "not installed", "run `make setup`")
        return
    if elsewhere := os.environ.get("MLFLOW_TRACKING_URI"):
        # The address may hold a password: where it leads is enough.
        parts = urlsplit(elsewhere)
        place = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        yield Finding("mlflow", "ok", f"{version}; mirrors to {place} (MLFLOW_TRACKING_URI)")
        return
    if not file.exists():
        yield Finding("mlflow", "ok", f"{version}; {file}: none yet, the first run makes it")
        return
    try:
        connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
        try:
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        finally:
            connection.close()
    except (sqlite3.Error, TypeError) as error:
        yield Finding(
            "mlflow",
            "warn",
            f"{file}: {error}",
            "move it away: the next run makes a new one",
        )
    else:
        yield Finding("mlflow", "ok", f"{version}; {file} at revision {revision}")


def lock(home: Home) -> Iterator[Finding]:
    root = Path(kvlab.__file__).resolve().parents[2]
    file = root / f"constraints-{'cuda' if _driver() else 'cpu'}.txt"
    if not file.exists():
        yield Finding("lock", "ok", "not a source checkout: nothing to compare with")
        return
    differing = sorted(mismatches(file.read_text()))
    if differing:
        shown = ", ".join(differing[:6]) + (", ..." if len(differing) > 6 else "")
        found = f"{len(differing)} installed packages differ from {file.name}: {shown}"
        yield Finding("lock", "warn", found, "run `make setup`")
    else:
        yield Finding("lock", "ok", f"installed versions are those of {file.name}")


def serving(home: Home) -> Iterator[Finding]:
    from kvlab.platform.serving.vllm_0_32.engine import version

    try:
        yield Finding("vllm", "ok", f"{version()}, served through the adapter of 0.32")
    except KvlabError as error:
        yield Finding("vllm", "warn", str(error), "`make setup` installs it; only serving needs it")
        return
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="kvlab")
    if not found:
        yield Finding(
            "vllm plug-in", "warn", "kvlab's entry point is not installed", "run `make setup`"
        )


def mismatches(pins: str) -> Iterator[str]:
    """Yield "name installed (pinned)" for every installed package that is not at its pin."""
    for name, pin in re.findall(r"^([\w.-]+)==([^\s;]+)", pins, flags=re.MULTILINE):
        installed = _version(name)
        # torch 2.13.0+cpu is a build of 2.13.0.
        if installed is not None and pin not in (installed, installed.partition("+")[0]):
            yield f"{name} {installed} ({pin})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS: tuple[Callable[[Home], Iterator[Finding]], ...] = (
    python,
    torch,
    machine,
    disk,
    ray,
    store,
    tracking,
    serving,
    lock,
)
