"""Whether groups of layers hold from prompt to prompt: the measure of budgets fixed in advance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.budget.squeeze_attention.budget import shares_of
from kvlab.methods.budget.squeeze_attention.grouping import GROUPS, three_means

CUT = GROUPS - 1
"""The group whose layers keep less: the least important one."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summary(values: Tensor) -> dict[str, Any]:
    """Describe values [N, K] of N samples: mean, sample standard deviation and quantiles, by K."""
    at = torch.tensor(QUANTILES, dtype=values.dtype)
    bands = torch.quantile(values, at, dim=0)
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "quantiles": {f"{q:g}": band.tolist() for q, band in zip(QUANTILES, bands, strict=True)},
    }


def stability(values: Tensor, p: float | None, sections: Tensor) -> dict[str, Any]:
    """Say how alike the groups, ranks and budgets of samples are, and those of parts of the text.

    Args:
        values: [N, K] float64, how unimportant each KV layer is in each sample; high: its
            attention changes little.
        p: what the third group keeps, in averages; None: as the values say (see `shares_of`).
        sections: [N] int64, the part of the text that a sample is of.

    Returns:
        groups: of the mean values, 0 to 2, the last is cut. cut_share: samples that cut each layer.
        as_mean, as_majority: share of samples that cut the very layers which the mean values cut,
        and which most samples cut. majority: the layers that those cut.
        agreement: over all pairs of samples, the share of layers that both or neither cut.
        agreement_of_groups: the same of all three groups.
        rank_correlation: Spearman's, the mean over all pairs; least_rank_correlation: of any sample
        with the mean values.
        moved: mean over samples of the share of rows that their own budgets and those of the mean
        put into different layers; moved_most: of any sample. budgets: `summary` of the samples'
        own, in averages.
        sections: for each, samples, groups and shares; section_agreement: the least share of layers
        that two sections both cut or both leave; sections_moved: most rows that two sections'
        budgets place differently.
    """
    mean = values.mean(0)
    fixed, groups = shares_of(mean.tolist(), p), three_means(mean.tolist())
    each = torch.tensor([three_means(row) for row in values.tolist()])
    own = torch.stack([shares_of(row, p) for row in values.tolist()])
    cut, wanted = each == CUT, torch.tensor(groups) == CUT
    most_cut, times = Counter(tuple(row) for row in cut.tolist()).most_common(1)[0]
    distance = moved(own, fixed)
    ranks = _ranks(values)
    return {
        "groups": groups,
        "cut_share": cut.double().mean(0).tolist(),
        "as_mean": float((cut == wanted).all(1).double().mean()),
        "as_majority": times / len(values),
        "majority": [layer for layer, is_cut in enumerate(most_cut) if is_cut],
        "agreement": _agreement(cut.long()),
        "agreement_of_groups": _agreement(each),
        "rank_correlation": _mean_correlation(ranks),
        "least_rank_correlation": float((ranks @ _ranks(mean[None])[0]).min()),
        "moved": float(distance.mean()),
        "moved_most": float(distance.max()),
        "budgets": summary(own),
        **_between(values, p, sections),
    }


def moved(shares: Tensor, other: Tensor) -> Tensor:
    """Return the share of all rows that two divisions [..., K] put into different layers, [...]."""
    return (shares - other).abs().sum(-1) / 2 / shares.shape[-1]


def _between(values: Tensor, p: float | None, sections: Tensor) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for number in torch.unique(sections).tolist():
        chosen = values[sections == number]
        mean = chosen.mean(0).tolist()
        shares = shares_of(mean, p).tolist()
        parts.append({"samples": len(chosen), "groups": three_means(mean), "shares": shares})
    pairs = list(combinations(parts, 2))
    return {
        "sections": parts,
        "section_agreement": min((agreed(a["groups"], b["groups"]) for a, b in pairs), default=1.0),
        "sections_moved": max(
            (float(moved(torch.tensor(a["shares"]), torch.tensor(b["shares"]))) for a, b in pairs),
            default=0.0,
        ),
    }


def agreed(groups: Sequence[int], others: Sequence[int]) -> float:
    """Return the share of layers that two groupings both cut or both leave."""
    same = sum((a == CUT) == (b == CUT) for a, b in zip(groups, others, strict=True))
    return same / len(groups)


def _agreement(labels: Tensor) -> float:
    """Share of (pair of samples, layer) with equal labels, from labels [N, K]."""
    count = len(labels)
    each = torch.stack([(labels == label).sum(0) for label in range(GROUPS)]).double()
    return float((each * (each - 1)).sum(0).mean() / (count * (count - 1)))


def _ranks(values: Tensor) -> Tensor:
    """Ranks of each row [N, K], ties shared, centred and of length one (zero where all tie)."""
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    ties = (values[:, :, None] == values[:, None, :]).sum(2)
    ranks = below + (ties - 1) / 2
    ranks = ranks.double() - ranks.double().mean(1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(ranks, dim=1, keepdim=True)
    return ranks / norms.clamp_min(1e-30)


def _mean_correlation(ranks: Tensor) -> float:
    """Mean over all pairs of rows of their product: what their sum says of it."""
    count = len(ranks)
    return float((ranks.sum(0).square().sum() - ranks.square().sum()) / (count * (count - 1)))
