"""Where documents come from: one function over every kind of source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvlab.platform.data import files, hub, python_text, recall
from kvlab.platform.data.documents import DataError, Document


def documents(source: Mapping[str, Any], layout: str = "text") -> Iterator[Document]:
    """Yield a source's documents lazily and in a fixed order.

    Args:
        source: {"kind": "python" | "recall" | "text" | "folder" | "hub", ...} as the data job's
            spec has it.
        layout: "text", or "chat" where each record is a conversation.

    Raises:
        DataError: the source cannot be read as asked.
    """
    chat = layout == "chat"
    kind = source["kind"]
    if kind == "python":
        if chat:
            raise DataError("source python: holds no conversations; use format: text")
        return python_text.documents()
    if kind == "recall":
        return recall.documents(source)
    if kind == "text":
        return files.of_file(Path(source["path"]), source.get("column"), chat)
    if kind == "folder":
        pattern = files.pattern_of(source, layout)
        return files.of_folder(Path(source["path"]), pattern, source.get("column"), chat)
    if kind == "hub":
        return hub.documents(source, chat)
    raise DataError(f"data source '{kind}': must be python, recall, text, folder or hub")
