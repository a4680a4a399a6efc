"""Hugging Face data sets, by name or from a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvlab.platform.data.documents import DataError, Document
from kvlab.platform.data.files import of_row


def documents(source: Mapping[str, Any], chat: bool) -> Iterator[Document]:
    """Stream a split's rows as documents; nothing beyond what is read is downloaded.

    Args:
        source: name (of a data set, or a folder of one), and optionally config, split ("train"),
            column ("text", or "messages" for chat) and revision.
        chat: the column holds conversations.

    Raises:
        DataError: no such data set, config, split or column, or it cannot be reached.
    """
    name, split = str(source["name"]), str(source.get("split") or "train")
    column = source.get("column") or ("messages" if chat else "text")
    for number, row in enumerate(_rows(name, split, source)):
        yield from of_row(row, column, chat, f"data set {name} ({split}) row {number}")


def _rows(name: str, split: str, source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    config, revision = source.get("config"), source.get("revision")
    try:
        yield from load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data set {name} (config {config or 'default'}, split {split}): {reason:.200}; "
            "check the name, config and split, or give a downloaded folder as the name"
        ) from None
