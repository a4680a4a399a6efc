"""Folders that appear whole or not at all: written aside, synced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlab import KvlabError
from kvlab.platform.record import fault


def publish(folder: Path, target: Path) -> Path | None:
    """Rename `folder` to `target`, after its files reached the disk.

    A target that is already there is another attempt's, complete and equal by identity: it stays,
    and `folder` is left for its owner to remove.

    Returns:
        target, or None when `folder` holds nothing.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    fault.point("publish.before_rename")
    move(folder, target)
    fault.point("publish.after_rename")
    return target


def move(folder: Path, target: Path) -> None:
    """Rename durably; a non-empty `target` wins."""
    sync(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    _sync_one(target.parent)


def sync(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(parent, name))
        _sync_one(Path(parent))


def remove(folder: Path) -> None:
    """Delete a folder that may be gone already."""
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` at the end, or nothing does.

    Raises:
        KvlabError: it cannot be written.
    """
    target = folder.absolute()
    made = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        made.mkdir(parents=True)
        yield made
        made.rename(target)
    except OSError as error:
        raise KvlabError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        remove(made)
