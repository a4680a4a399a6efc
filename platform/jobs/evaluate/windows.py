"""Held-out text as windows, and the target tokens that every arm is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.nn.functional as F
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
        ends: [N, T] bool, the ends of documents. documents: [N], the one each window begins in.
        first_target: the first position of a window that is scored.
    """

    ids: Tensor
    valid: Tensor
    targets: Tensor
    widths: Tensor
    ends: Tensor
    documents: Tensor
    first_target: int

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """Return the hash that two arms share exactly when they were scored on the same targets."""
        digest = sha256(f"{tuple(self.ids.shape)}".encode())
        digest.update(self.ids.to(torch.int32).numpy().tobytes())
        digest.update(self.targets.numpy().tobytes())
        return digest.hexdigest()

    def mixed(self, length: int) -> float:
        """Return the share of targets in blocks of `length` that hold two documents.

        Windows join documents wherever they end; a model of blocks was trained on blocks that hold
        one document each.
        """
        joined = self.ends.clone()
        joined[:, length - 1 :: length] = False
        blocks = torch.unflatten(F.pad(joined, (0, -joined.shape[1] % length)), 1, (-1, length))
        inside = blocks.any(-1).repeat_interleave(length, 1)[:, : joined.shape[1]]
        return int((inside & self.targets).sum()) / max(1, int(self.targets.sum()))


def cut(corpus: Corpus, length: int, tokens: int, first_target: int) -> Windows:
    """Join documents, an end of text after each, and cut windows evenly spaced over all of them.

    Args:
        corpus: the held-out part. length: tokens of a window.
        tokens: how many to use at most; where they end inside a window, the last one is padded.
        first_target: the first position of a window that every arm predicts.
    """
    documents = len(corpus.ends)
    # The end of document d stands after its tokens and the ends of the d documents before it.
    stops = corpus.ends + torch.arange(documents)
    whole = int(stops[-1]) + 1 if documents else 0
    size = min(tokens, whole)
    count = -(-size // length)
    # With fewer windows than there are, every part of the text has its share of them.
    apart = max(1.0, whole // length / max(1, count))
    starts = (torch.arange(count, dtype=torch.float64) * apart).long() * length
    places = starts[:, None] + torch.arange(length)
    within = (torch.arange(count * length) < size).view(count, length)
    valid = within & (places < whole)
    document = torch.searchsorted(stops, places).clamp(max=documents - 1)
    ends = valid & (places == stops[document])
    source = (places - document).clamp(max=corpus.tokens.numel() - 1)

    def taken(values: Tensor, at_end: int, beyond: int) -> Tensor:
        return values[source].masked_fill(ends, at_end).masked_fill(~valid, beyond)

    counts = taken(corpus.counts.bool(), True, False)
    return Windows(
        ids=taken(corpus.tokens.long(), corpus.end_of_text, PAD),
        valid=valid,
        targets=counts & (torch.arange(length) >= first_target),
        widths=taken(corpus.widths, 0, 0),
        ends=ends,
        documents=document[:, 0],
        first_target=first_target,
    )
