"""From documents to training rows: an endless stream whose place can be written down exactly.

A method's granularity decides how documents are framed (`LanguageModel.packer`); the order of the
documents, the cutting into rows and the cursor are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlab import KvlabError

PAD = 0
"""The id that padding carries. It is never scored."""


class PackingError(KvlabError):
    """Documents that make no rows, or a cursor of another stream."""


class Rows(NamedTuple):
    """Training rows, or a stretch of the stream they are cut from: all three of one shape.

    ids int64 [..., T]; valid bool, false on padding; counts bool, false where a token is context
    only (padding, and the prompt of a chat).
    """

    ids: Tensor
    valid: Tensor
    counts: Tensor


class Documents:
    """Tokenised documents, concatenated without separators.

    Args:
        tokens: [N] token ids.
        ends: [D] int64, the end of each document in `tokens`.
        counts: [N] bool, false on tokens masked from the loss; None: all count.
    """

    def __init__(self, tokens: Tensor, ends: Tensor, counts: Tensor | None = None) -> None:
        self.tokens = tokens
        self.ends: list[int] = ends.tolist()
        self.counts = counts
        if not self.ends or self.ends[-1] != tokens.numel():
            raise PackingError(
                f"documents end at {self.ends[-1:] or 'nothing'}, but there are {tokens.numel()} "
                "tokens: the data are incomplete"
            )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return ids int64 [n] and counts bool [n] of one document."""
        start, end = (self.ends[index - 1] if index else 0), self.ends[index]
        ids = self.tokens[start:end].long()
        if self.counts is None:
            return ids, torch.ones(ids.shape, dtype=torch.bool)
        return ids, self.counts[start:end].bool()


class Packer(ABC):
    """Documents in a seeded order, framed, joined and cut every `sequence_length` tokens.

    Every epoch has its own order (and, in subclasses, its own padding), drawn from the seed and the
    epoch's number alone; so the cursor is four integers and finding a place again costs nothing.

    Args:
        documents: what to read, over and over.
        sequence_length: tokens of a row.
        eos: the id that ends every document.
        seed: of the order.
    """

    def __init__(
        self, documents: Documents, sequence_length: int, *, eos: int, seed: int = 0
    ) -> None:
        self.documents, self.sequence_length = documents, sequence_length
        self.eos, self.seed = eos, seed
        self._open(epoch=0, place=0, offset=0)

    def draw(self, generator: torch.Generator) -> None:  # noqa: B027
        """Draw what else an epoch needs, after its order; overridden where framing is random."""

    @abstractmethod
    def frame(self, ids: Tensor, counts: Tensor, place: int) -> Rows:
        """Return the stretch [n] that one document contributes; `place` is its rank this epoch."""

    def take(self, rows: int) -> Rows:
        """Return the next rows, each tensor [rows, sequence_length]."""
        missing = rows * self.sequence_length
        pieces: list[Rows] = []
        while missing:
            stretch = self._stretch()
            piece = Rows(*(t[self._offset : self._offset + missing] for t in stretch))
            pieces.append(piece)
            missing -= piece.ids.numel()
            self._offset += piece.ids.numel()
            if self._offset == stretch.ids.numel():
                self._advance()
        shape = (rows, self.sequence_length)
        return Rows(*(torch.cat(column).view(shape) for column in zip(*pieces, strict=True)))

    def cursor(self) -> dict[str, Any]:
        """Return the place in the stream as JSON."""
        return {
            "seed": self.seed, "epoch": self._epoch, "place": self._place, "offset": self._offset,
        }  # fmt: skip

    def seek(self, cursor: dict[str, Any]) -> None:
        """Go to a place that `cursor` returned; raise a PackingError if it is not ours."""
        if cursor["seed"] != self.seed or not 0 <= cursor["place"] < len(self.documents):
            raise PackingError(
                f"cursor {cursor} is no place among {len(self.documents)} documents with seed "
                f"{self.seed}: the checkpoint belongs to other data"
            )
        self._open(epoch=cursor["epoch"], place=cursor["place"], offset=cursor["offset"])

    def _open(self, epoch: int, place: int, offset: int) -> None:
        self._epoch, self._place, self._offset = epoch, place, offset
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        self._order = torch.randperm(len(self.documents), generator=generator)
        self.draw(generator)
        self._framed: Rows | None = None

    def _stretch(self) -> Rows:
        if self._framed is None:
            ids, counts = self.documents[int(self._order[self._place])]
            self._framed = self.frame(ids, counts, self._place)
        return self._framed

    def _advance(self) -> None:
        self._place, self._offset, self._framed = self._place + 1, 0, None
        if self._place == len(self.documents):
            self._open(epoch=self._epoch + 1, place=0, offset=0)


class TokenPacker(Packer):
    """Documents joined by one EOS each, without padding."""

    def frame(self, ids: Tensor, counts: Tensor, place: int) -> Rows:
        ids = torch.cat([ids, ids.new_tensor([self.eos])])
        counts = torch.cat([counts, counts.new_ones(1)])
        return Rows(ids, torch.ones_like(counts), counts)
