"""Tokenised documents on disk: what the data job publishes and every other job reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvlab.platform.data.documents import DataError

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["train", "heldout"]


class Writer:
    """Collects the documents of one part and writes them as one safetensors file."""

    def __init__(self) -> None:
        self.tokens: list[NDArray[np.int32]] = []
        self.widths: list[NDArray[np.int32]] = []
        self.counts: list[NDArray[np.bool_]] = []
        self.ends: list[int] = []

    @property
    def total(self) -> int:
        """Tokens so far."""
        return self.ends[-1] if self.ends else 0

    def add(self, pieces: list[tuple[NDArray[np.int32], NDArray[np.int32], bool]]) -> None:
        """Add one document: (ids, bytes, counts) of each of its segments."""
        size = 0
        for ids, widths, counts in pieces:
            self.tokens.append(ids)
            self.widths.append(widths)
            self.counts.append(np.full(len(ids), counts))
            size += len(ids)
        if size:
            self.ends.append(self.total + size)

    def write(self, file: Path) -> dict[str, int]:
        """Write the tensors and return how many documents, tokens, bytes and targets there are."""
        from safetensors.numpy import save_file

        tokens = np.concatenate([np.zeros(0, np.int32), *self.tokens])
        widths = np.concatenate([np.zeros(0, np.int32), *self.widths])
        counts = np.concatenate([np.zeros(0, np.bool_), *self.counts])
        ends = np.asarray(self.ends, dtype=np.int64)
        save_file({"tokens": tokens, "ends": ends, "counts": counts, "bytes": widths}, file)
        return {
            "documents": len(ends),
            "tokens": len(tokens),
            "bytes": int(widths.sum()),
            "targets": int(counts.sum()),
        }


@dataclass(frozen=True, slots=True)
class Corpus:
    """One part of a data job's artifacts.

    Attributes:
        tokens: [N] int32, documents concatenated without separators.
        ends: [D] int64, the end of each document in `tokens`.
        counts: [N] bool, false on tokens masked from the loss.
        widths: [N] int32, the UTF-8 bytes each token stands for.
        end_of_text: the id that ends a document. vocab_size: ids a model needs.
    """

    tokens: Tensor
    ends: Tensor
    counts: Tensor
    widths: Tensor
    end_of_text: int
    vocab_size: int


def describe(folder: Path) -> dict[str, Any]:
    """Return a data job's data.json."""
    try:
        raw: dict[str, Any] = json.loads((folder / "data.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: holds no data of kvlab ({error})") from None
    return raw


def load(folder: Path, part: Part) -> Corpus:
    """Read one part of the data in `folder`.

    Raises:
        DataError: the files are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = describe(folder)
    file = folder / f"{part}.safetensors"
    try:
        read = load_file(file)
        return Corpus(
            read["tokens"], read["ends"], read["counts"], read["bytes"],
            end_of_text=about["end_of_text"], vocab_size=about["vocab_size"],
        )  # fmt: skip
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{file}: not readable as tokens ({error})") from None
