"""What a data job's identity knows of its inputs: digests by content. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvlab.platform.data import python_text
from kvlab.platform.data.documents import DataError
from kvlab.platform.data.files import matching, pattern_of


def source(source: Mapping[str, Any], layout: str = "text") -> str:
    """Return the hex digest of a source's content.

    A data set that is not a local folder is known by its name, config, split, column and revision
    alone: its content is not downloaded to be planned, so pin `revision` where it may change.

    Raises:
        DataError: a file or folder that is not there.
    """
    kind = source["kind"]
    if kind == "python":
        return python_text.fingerprint()
    if kind == "recall":
        return sha256(json.dumps(dict(source), sort_keys=True).encode()).hexdigest()
    if kind == "text":
        path = Path(source["path"])
        return _files([(path.suffix, path)])  # which says how the file is read
    if kind == "folder":
        folder = Path(source["path"])
        found = matching(folder, pattern_of(source, layout))
        return _files((p.relative_to(folder).as_posix(), p) for p in found)
    folder = Path(source["name"])
    if folder.is_dir():
        return _files((p.relative_to(folder).as_posix(), p) for p in matching(folder, "**/*"))
    known = {k: source.get(k) for k in ("name", "config", "split", "column", "revision")}
    return sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def tokenizer(path: Path) -> str:
    """Return the hex digest of a tokenizer.json, or of the tokenizer files of a folder.

    Raises:
        DataError: there is no tokenizer.json.
    """
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer_config.json", "config.json")
        return _files((n, path / n) for n in names if n == names[0] or (path / n).is_file())
    return _files([("tokenizer.json", path)])


def _files(named: Iterable[tuple[str, Path]]) -> str:
    digest = sha256()
    for name, path in named:
        content = sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    content.update(chunk)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        digest.update(name.encode() + b"\0" + content.digest())
    return digest.hexdigest()
