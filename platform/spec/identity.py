"""What a job's result depends on, digested: its own settings, its parents, its code, its machine.

A finished identity is reused. `parts` keeps short values as they are and digests of long ones, so
that `plan` can say which part made a job stale. Docs, tests and reports are no part of anything.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kvlab
from kvlab import KvlabError
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import KINDS
from kvlab.platform.spec.machine import describe

Machine = tuple[str | None, int | None]
"""Who measures: the cluster (None: this machine), and how many CPUs jobs may have there."""

SHORT = 48
"""Longest JSON text that a part keeps as it is."""

PLACES = frozenset({"path", "checkpoint", "name"})
"""Keys that say where something lies: content counts instead wherever a fingerprint covers them."""


def identify(
    kind: str,
    spec: Mapping[str, Any],
    parents: Mapping[str, str],
    code: str,
    machine: Mapping[str, Any] | None = None,
    incidental: frozenset[str] = frozenset(),
    libraries: Sequence[str] = (),
) -> tuple[str, dict[str, str]]:
    """Return a cell's identity (64 hex digits) and its parts.

    Args:
        kind: name of the job kind.
        spec: the resolved spec, JSON.
        parents: role -> identity of that parent.
        code: digest of the sources that decide the result (`code_digest`).
        machine: for measured kinds, what the numbers belong to.
        incidental: keys of the spec that decide nothing.
        libraries: installed distributions besides torch whose version counts.
    """
    covered = "fingerprint" in spec
    parts = {
        key: _part(_content(value, covered) if isinstance(value, Mapping) else value)
        for key, value in spec.items()
        if key not in incidental
    }
    parts |= {f"parent {role}": identity for role, identity in parents.items()}
    parts["code"] = code
    parts |= {name: _version(name) for name in ("torch", *libraries)}
    if machine is not None:
        parts |= {f"machine {key}": _part(value) for key, value in machine.items()}
    text = _encode([kind, parts])
    return sha256(text.encode()).hexdigest(), parts


def identity_of(
    name: str,
    spec: Mapping[str, Any],
    parents: Mapping[str, str],
    resources: Resources,
    machine: Machine,
) -> tuple[str, dict[str, str]]:
    """Return the identity of a job of a kind, and its parts; see `identify`.

    Args: parents: role -> identity of that parent. machine: who measures.
    """
    kind = KINDS[name]
    return identify(
        name,
        spec,
        parents,
        code_digest(kind.sources(spec)),
        describe(resources, *machine) if kind.measured else None,
        kind.incidental,
        kind.libraries(spec),
    )


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the parts that differ, the most telling first."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return sorted(names, key=lambda name: (name in ("code", "torch"), name.startswith("parent")))


def explain(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return how one part changed: `tokens 100 -> 200`, or its name where values are digests."""
    old, new = before.get(name, "absent"), now.get(name, "absent")
    if any(value.startswith("sha256:") for value in (old, new)) or name.startswith("parent "):
        return name
    if name in ("code",):
        return name
    return f"{name} {old} -> {new}"


def _content(value: Any, covered: bool) -> Any:
    """Drop places that a fingerprint beside or above them covers."""
    if not isinstance(value, Mapping):
        return value
    covered = covered or "fingerprint" in value
    return {
        key: _content(below, covered)
        for key, below in value.items()
        if not (covered and key in PLACES)
    }


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _part(value: Any) -> str:
    text = repr(value) if type(value) is int else _encode(value)
    return text if len(text) <= SHORT else _digest(text)


@lru_cache(maxsize=4096)
def _digest(text: str) -> str:
    return "sha256:" + sha256(text.encode()).hexdigest()


@lru_cache(maxsize=64)
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        raise KvlabError(f"{library} is not installed: run `make setup`") from None


@lru_cache(maxsize=4096)
def code_digest(sources: tuple[str, ...]) -> str:
    """Return the digest of the Python files of packages and modules, without importing them."""
    digest = sha256()
    for name in sorted(set(sources)):
        digest.update(_module_digest(name).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _module_digest(name: str) -> str:
    path = _location(name)
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    digest = sha256(name.encode())
    for file in files:
        if "__pycache__" not in file.parts:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0")
            digest.update(sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _location(name: str) -> Path:
    """Return the folder of a package or the file of a module."""
    head, *rest = name.split(".")
    if head == "kvlab" and rest:
        base = Path(kvlab.__file__).parent.joinpath(*rest)
        found = base if base.is_dir() else base.with_suffix(".py")
        if found.exists():
            return found
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise KvlabError(f"source package '{name}' of a job kind or method is not installed")
    origin = Path(spec.origin)
    return origin.parent if spec.submodule_search_locations else origin
