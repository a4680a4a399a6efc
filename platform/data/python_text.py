"""This machine's own text: Python's documentation topics and the standard library's modules."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from kvlab.platform.data.documents import DataError, Document, plain

TOPICS = "pydoc_data/topics.py"
# Tests, tables of characters and vendored tools: repetitive, partly not UTF-8, not always there.
SKIPPED = frozenset(
    {
        "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib2to3",
        "pydoc_data", "site-packages", "test", "tests", "turtledemo",
    }
)  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    """Return (path inside the standard library, file) of every module, sorted by that path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in SKIPPED and not n.startswith("config-")]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def documents() -> Iterator[Document]:
    """Yield every documentation topic, then every module's source, in a fixed order.

    Raises:
        DataError: this Python came without the sources of its library.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield plain(topics[name])
    files = modules()
    if not files:
        raise DataError(
            f"source python: no module sources under {sysconfig.get_paths()['stdlib']}; "
            "this Python is stripped: give a text file or a folder instead"
        )
    for _, path in files:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # PEP 263 allows other encodings; such a module is no loss
            continue
        if text.strip():
            yield plain(text)


def fingerprint() -> str:
    """Return the hex digest of Python's version and of every file that `documents` reads."""
    digest = sha256(platform.python_version().encode())
    topics = Path(sysconfig.get_paths()["stdlib"], TOPICS)
    for name, path in [(TOPICS, topics), *modules()]:
        if path.is_file():
            digest.update(name.encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()
