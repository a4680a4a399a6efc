"""Digests of files by content, remembered by (path, size, time of change) where that is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvlab.platform.data import fingerprint
from kvlab.platform.data.files import matching
from kvlab.platform.data.vocabulary import file_of
from kvlab.platform.home import unwritable
from kvlab.platform.jobs import checkpoint

REMEMBERED = "contents.json"


class Contents:
    """Digests sources, tokenizers and checkpoints.

    Args:
        folder: KVLAB_HOME, whose memory of digests is read; None: nothing is remembered.
        write: also remember what is digested now (only a run may).
    """

    def __init__(self, folder: Path | None = None, *, write: bool = False) -> None:
        self._file = folder / REMEMBERED if folder is not None else None
        self._write = write
        self._known: dict[str, str] | None = None
        self._fresh = False

    def source(self, source: Mapping[str, Any], layout: str) -> str:
        """Return the digest of a data source's content."""
        digest: Callable[[], str] = lambda: fingerprint.source(source, layout)  # noqa: E731
        if source["kind"] == "text":
            return self._remember([Path(source["path"])], "file", digest)
        if source["kind"] == "folder":
            files = matching(Path(source["path"]), source["pattern"])
            return self._remember(files, f"folder {source['pattern']}", digest)
        return digest()

    def tokenizer(self, path: Path) -> str:
        """Return the digest of a tokenizer's files."""
        return self._remember([file_of(path)], "tokenizer", lambda: fingerprint.tokenizer(path))

    def checkpoint(self, path: Path) -> str:
        """Return the digest of a checkpoint's description and weights."""
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        return self._remember(files, "checkpoint", lambda: checkpoint.fingerprint(path))

    def save(self) -> None:
        """Write what was digested since, if this may write. Raises KvlabError if it cannot."""
        if self._file is None or not self._write or not self._fresh:
            return
        beside = self._file.with_suffix(".new")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(self._known), encoding="utf-8")
            beside.replace(self._file)
        except OSError as error:
            raise unwritable(self._file.parent, error) from error
        self._fresh = False

    def _remember(self, files: Iterable[Path], what: str, digest: Callable[[], str]) -> str:
        if self._file is None:
            return digest()
        key = sha256(what.encode())
        for file in files:
            stat = file.stat()
            key.update(f"\0{file}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        if self._known is None:
            self._known = _read(self._file)
        found = self._known.get(key.hexdigest())
        if found is None:
            found = self._known[key.hexdigest()] = digest()
            self._fresh = True
        return found


class Unread(Contents):
    """Leaves content unread: for `validate`, which needs no identities."""

    def source(self, source: Mapping[str, Any], layout: str) -> str:
        return ""

    def tokenizer(self, path: Path) -> str:
        return ""

    def checkpoint(self, path: Path) -> str:
        return ""


def _read(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
