"""Recall by depth and length, all arms in one heat map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvlab.platform.compare.model import Arm, Comparison, Setting
from kvlab.platform.compare.plots.layout import Chart, layout, safe, titled
from kvlab.platform.compare.samples import Recalled

SCALE = [[0.0, "#b2182b"], [0.5, "#fddbc7"], [1.0, "#2166ac"]]
TEXT = (
    "Share of questions answered, by the depth of what is asked for (0 is the beginning of the "
    "context) within each length. A cell is void where the full cache of the same model answers "
    "too few to compare with."
)
ROW = 34
"""Pixels of height of an arm."""


def plot(comparison: Comparison, colour: Mapping[str, str]) -> Iterator[Chart]:
    """Yield a heat map for every set of questions and task."""
    settings = [s for s in comparison.settings if s.place in ("recall", "multi_turn")]
    for number, setting in enumerate(settings):
        arms = [arm for arm in comparison.arms if arm.cells.get(setting.id)]
        tasks = dict.fromkeys(cell.task for arm in arms for cell in arm.cells[setting.id])
        for task in tasks:
            yield _map(f"recall-{number}-{task}", setting, task, arms)


def _map(name: str, setting: Setting, task: str, arms: list[Arm]) -> Chart:
    found = [{(c.length, c.depth): c for c in a.cells[setting.id] if c.task == task} for a in arms]
    places = sorted({place for cells in found for place in cells})
    rows = [[cells.get(place) for place in places] for cells in found]
    asked = "question in the prompt" if setting.place == "recall" else "question after the cut"
    figure = layout(titled("length, depth", type="multicategory"), {"type": "category"}, False)
    # The first arm stands at the top.
    figure["yaxis"] |= {"autorange": "reversed", "ticks": ""}
    figure["height"] = 150 + ROW * len(arms)
    heat = {
        "type": "heatmap",
        "x": [[f"{length} tokens" for length, _ in places], [f"{d:g}" for _, d in places]],
        "y": [safe(arm.id) for arm in arms],
        "z": [[None if c is None or c.void else c.accuracy for c in row] for row in rows],
        "text": [[_text(cell) for cell in row] for row in rows],
        "texttemplate": "%{text}",
        "hovertext": [[_hint(cell) for cell in row] for row in rows],
        "hoverinfo": "text",
        "hoverongaps": False,
        "colorscale": SCALE,
        "zmin": 0,
        "zmax": 1,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"tickformat": ".0%", "thickness": 12},
    }
    title = f"{task.replace('_', ' ').capitalize()}, {asked}: {setting.id}"
    return Chart(name, title, TEXT, [heat, *_voids(rows, heat)], figure, wide=True)


def _voids(rows: list[list[Recalled | None]], heat: dict[str, object]) -> list[dict[str, object]]:
    """A grey layer that says `void`: a heat map writes no text where it has no number."""
    marks = [[1.0 if cell is not None and cell.void else None for cell in row] for row in rows]
    if not any(mark for row in marks for mark in row):
        return []
    grey = [[0.0, "#e5e7eb"], [1.0, "#e5e7eb"]]
    return [{**heat, "z": marks, "colorscale": grey, "showscale": False}]


def _text(cell: Recalled | None) -> str:
    if cell is None:
        return ""
    return "void" if cell.void else f"{100 * cell.accuracy:.0f}"


def _hint(cell: Recalled | None) -> str:
    if cell is None:
        return "not asked"
    return cell.void or f"{cell.accuracy:.1%}, full cache {cell.full_accuracy:.1%}"
