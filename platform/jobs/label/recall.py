"""Recall at m: how many of the tokens that matter are among the m of highest score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Recalls:
    """Adds up recall and precision over texts, by who scores and by m.

    Only tokens with more than m before them count: with fewer, anything finds all. Precision is
    that of as many tokens as are labelled.

    Args: kept: the m's.
    """

    def __init__(self, kept: Sequence[int]) -> None:
        self._kept = tuple(kept)
        self._sums: dict[str, Tensor] = {}

    def see(self, who: str, scores: Tensor, marks: Tensor, current: Tensor | None = None) -> None:
        """Take in the scores [..., Q, T] for current tokens, and which of all tokens [T] matter.

        Args:
            marks: [..., Q, T] bool. current: [..., Q], where these tokens stand; None: all of T.
        """
        rows = marks.shape[-1]
        places = torch.arange(rows, device=marks.device)
        now = (places if current is None else current).expand(marks.shape[:-1])
        past = places <= now.unsqueeze(-1)
        ranked = scores.expand(marks.shape).masked_fill(~past, float("-inf"))
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        hits = marks.gather(-1, order).cumsum(-1).double()
        wanted = marks.sum(-1).clamp_min(1).double()
        sums = []
        for m in self._kept:
            counts = (now >= m).double()
            share = hits[..., min(m, rows) - 1] / wanted
            sums.append(torch.stack(((share * counts).sum(), counts.sum())))
        some = (now >= wanted).double()
        exact = hits.gather(-1, (wanted.long() - 1).unsqueeze(-1))[..., 0] / wanted
        sums.append(torch.stack(((exact * some).sum(), some.sum())))
        found = torch.stack(sums).cpu()
        self._sums[who] = self._sums[who] + found if who in self._sums else found

    def result(self) -> dict[str, dict[str, object]]:
        """By who: recall (m -> a share, as text keys) and precision."""
        found: dict[str, dict[str, object]] = {}
        for who, sums in self._sums.items():
            shares = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
            recall = {str(m): share for m, share in zip(self._kept, shares, strict=False)}
            found[who] = {"recall": recall, "precision": shares[-1]}
        return found


def kept_for(top: int, length: int) -> tuple[int, ...]:
    """The m's that recall is told for: the number of labels, twice and four times it."""
    return tuple(m for m in (top, 2 * top, 4 * top) if m < length)
