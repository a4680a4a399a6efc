"""One line of the table of a try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvlab.platform.trying.figures import Divergence, Recall, Speed
from kvlab.platform.trying.points import Point

Mark = Literal["best", "tied", ""]


@dataclass(frozen=True, slots=True)
class Row:
    """One point with all that is known of it.

    Attributes:
        failed: why it has no divergence, where it was to have one.
        lacking: why it was not asked or not timed, where it was to be.
        served: how many vLLM's pool of as much memory holds; None: it cannot be served.
        kv_bytes: of one sequence at its end: measured, or as the cost model says (`predicted`).
        of_full: those bytes over the full cache's, both by the same way.
        sequences: how many fit the memory beside the weights; None: the weights alone do not.
        over: it holds clearly more than its budget: what is generated stays beside it.
        mark: the nearest to the full cache of those within the budget, or not told from that.
    """

    point: Point
    divergence: Divergence | None
    recall: Recall | None
    speed: Speed | None
    kv_bytes: float
    predicted: bool
    of_full: float
    sequences: int | None
    over: bool = False
    mark: Mark = ""
    failed: str = ""
    lacking: str = ""
    served: int | None = None
