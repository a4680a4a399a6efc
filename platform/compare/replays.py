"""Which arms had their decode steps replayed in a CUDA graph, where not all had."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.platform.compare.arms import Draft
from kvlab.platform.compare.labels import grouped, listed

NEAR = 0.1
"""Shares that differ by less are alike: the steps before a capture are fewer or more."""


def replay_notes(drafts: Sequence[Draft]) -> list[str]:
    """Say how much of each arm's decoding was replayed, where that is not alike."""
    found = {draft.id: share for draft in drafts if (share := _share(draft)) is not None}
    if not found or max(found.values()) - min(found.values()) < NEAR:
        return []
    shares = grouped({name: f"{share:.0%}".replace("%", " %") for name, share in found.items()})
    each = "; ".join(f"{share} of {listed(names)}" for share, names in shares.items())
    return [
        f"Decode steps that were replayed in a CUDA graph: {each}. A step that was not also waits "
        "for the host, so these rates are not of one kind."
    ]


def _share(draft: Draft) -> float | None:
    """The least share of its benchmarks' rows; None where none says."""
    shares = [
        share
        for job in draft.measurements
        if job.kind == "benchmark" and job.result is not None
        for row in job.result.get("rows") or ()
        if (share := row.get("replayed")) is not None
    ]
    return min(shares, default=None)
