"""Held-out text as windows, and the target tokens that every arm is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from kvlab.methods.packing import PAD
from kvlab.platform.data.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of held-out text: the same for every arm, whatever its method.

    Attributes:
        ids: [N, T] int64. valid: [N, T] bool, false on the padding of the last window.
        targets: [N, T] bool, the tokens that are scored.
        widths: [N, T] int32, the UTF-8 bytes each token stands for (0 for the end of a document).
        first_target: the first position of a window that is scored.
    """

    ids: Tensor
    valid: Tensor
    targets: Tensor
    widths: Tensor
    first_target: int

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """Return the hash that two arms share exactly when they were scored on the same targets."""
        digest = sha256(f"{tuple(self.ids.shape)}".encode())
        digest.update(self.ids.to(torch.int32).numpy().tobytes())
        digest.update(self.targets.numpy().tobytes())
        return digest.hexdigest()


def cut(corpus: Corpus, length: int, tokens: int, first_target: int) -> Windows:
    """Join documents, an end of text after each, and cut windows one after the other.

    Args:
        corpus: the held-out part. length: tokens of a window.
        tokens: how many to use at most; the last window is padded where they end inside it.
        first_target: the first position of a window that every arm predicts.
    """
    ends = corpus.ends
    size = min(tokens, int(ends[-1]) + len(ends)) if len(ends) else 0
    count = -(-size // length)
    # The end of document d stands after its tokens and the ends of the d documents before it.
    places = torch.arange(int(ends[-1]) + len(ends))
    stops = ends + torch.arange(len(ends))
    is_stop = torch.zeros(len(places), dtype=torch.bool)
    is_stop[stops] = True

    def joined(values: Tensor, at_stop: int) -> Tensor:
        whole = torch.full((len(places),), at_stop, dtype=values.dtype)
        whole[~is_stop] = values
        padded = torch.zeros(count * length, dtype=values.dtype)
        padded[:size] = whole[:size]
        return padded.view(count, length)

    valid = (torch.arange(count * length) < size).view(count, length)
    counts = joined(corpus.counts, 1) & valid
    ids = joined(corpus.tokens.long(), corpus.end_of_text).masked_fill(~valid, PAD)
    scored = torch.arange(length) >= first_target
    return Windows(ids, valid, counts & scored, joined(corpus.widths, 0), first_target)
