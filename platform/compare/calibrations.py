"""What calibrate jobs found: which layers may keep less, and if that holds for every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvlab.db.rows import JobRow
from kvlab.db.states import JobState

KIND = "calibrate"
LOW, HIGH, LOWER, UPPER = "0.05", "0.95", "0.25", "0.75"


@dataclass(frozen=True, slots=True)
class Measure:
    """One importance over the samples, by KV layer; see `stability` of the job for the figures.

    Attributes:
        name: "cosine" or "mass". mean: over the samples. bands: quantile -> values.
        groups: 0 to 2 of the mean; 2 is cut. cut_share: samples that cut each layer.
    """

    name: str
    mean: tuple[float, ...]
    bands: Mapping[str, tuple[float, ...]]
    groups: tuple[int, ...]
    cut_share: tuple[float, ...]
    as_mean: float
    as_majority: float
    agreement: float
    rank_correlation: float
    moved: float
    moved_most: float
    section_agreement: float
    sections_moved: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """One calibrate job that is done.

    Attributes:
        id: its name. model: the name of the job that made the model.
        kv_layers: decoder layers that own keys and values. shares: their budgets, in averages.
        importance, p: what the budgets are from.
        lengths: tokens of a shorter prompt -> share of layers that it groups as the whole does.
    """

    id: str
    model: str
    samples: int
    sequence_length: int
    kv_layers: tuple[int, ...]
    importance: str
    p: float | None
    shares: tuple[float, ...]
    measures: tuple[Measure, ...]
    lengths: Mapping[int, float]

    @property
    def main(self) -> Measure:
        """The importance that the budgets are from."""
        return next(m for m in self.measures if m.name == self.importance)

    def cut(self, measure: Measure) -> list[int]:
        """The decoder layers whose keys and values are cut."""
        return [n for n, g in zip(self.kv_layers, measure.groups, strict=True) if g == 2]


def read_calibrations(jobs: Sequence[JobRow]) -> tuple[Calibration, ...]:
    """Return what the finished calibrate jobs of a workflow found, in its order."""
    done = [r for r in jobs if r.kind == KIND and r.state is JobState.DONE and r.result]
    return tuple(_read(row, row.result or {}) for row in done)


def calibrations_in_words(calibrations: Sequence[Calibration]) -> list[str]:
    """One sentence on each: could its budgets be fixed in advance?"""
    return [_sentence(calibration) for calibration in calibrations]


def _sentence(found: Calibration) -> str:
    main, cut = found.main, found.cut(found.main)
    if not cut:
        return f"{found.id}: all layers of {found.model} are alike, so none is cut."
    layers = f"{'layer' if len(cut) == 1 else 'layers'} {ranges(cut)}"
    return (
        f"{found.id}: {found.model} is cut in {layers}; {main.as_mean:.0%} of {found.samples} "
        f"samples cut exactly these, two samples agree on {main.agreement:.0%} of the layers, and "
        f"fixed budgets put {main.moved:.1%} of the rows elsewhere than a prompt's own would."
    ).replace("%", " %")


def _read(row: JobRow, result: Mapping[str, Any]) -> Calibration:
    budgets = result["budgets"]
    return Calibration(
        id=row.name,
        model=row.parents.get("of", ""),
        samples=result["samples"],
        sequence_length=result["sequence_length"],
        kv_layers=tuple(result["kv_layers"]),
        importance=budgets["importance"],
        p=budgets["p"],
        shares=tuple(budgets["shares"]),
        measures=tuple(
            _measure(name, result["importances"][name]["kv_layers"], result["stability"][name])
            for name in result["importances"]
        ),
        lengths={each["tokens"]: each["agreement"] for each in result["lengths"]},
    )


def _measure(name: str, values: Mapping[str, Any], stable: Mapping[str, Any]) -> Measure:
    return Measure(
        name=name,
        mean=tuple(values["mean"]),
        bands={key: tuple(band) for key, band in values["quantiles"].items()},
        groups=tuple(stable["groups"]),
        cut_share=tuple(stable["cut_share"]),
        as_mean=stable["as_mean"],
        as_majority=stable["as_majority"],
        agreement=stable["agreement"],
        rank_correlation=stable["rank_correlation"],
        moved=stable["moved"],
        moved_most=stable["moved_most"],
        section_agreement=stable["section_agreement"],
        sections_moved=stable["sections_moved"],
    )


def ranges(layers: list[int]) -> str:
    """`0, 4-7`: layers in order, as runs."""
    if not layers:
        return ""
    breaks = [i for i, (a, b) in enumerate(pairwise(layers), 1) if b != a + 1]
    starts, ends = [0, *breaks], [*breaks, len(layers)]
    runs = [(layers[a], layers[b - 1]) for a, b in zip(starts, ends, strict=True)]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
