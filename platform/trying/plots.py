"""The plots of a try as plain Plotly figures."""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.platform.compare.plots.layout import (
    BASELINE,
    PALETTE,
    Chart,
    Figure,
    layout,
    safe,
    titled,
)
from kvlab.platform.trying.row import Row
from kvlab.platform.trying.sheet import Sheet

MOST_LINES = 6
"""Points that the plot over positions shows."""


def charts(sheet: Sheet) -> list[Chart]:
    """Every plot that there are numbers for."""
    colour = colours(sheet)
    return [
        *_damage(sheet, colour),
        *_speed(sheet, colour),
        *_positions(sheet, colour),
        *_capacity(sheet, colour),
    ]


def colours(sheet: Sheet) -> dict[str, str]:
    """Label -> colour: the same in every plot and table; the full cache is grey."""
    found: dict[str, str] = {}
    for row in sheet.rows:
        label = row.point.label
        if not row.point.written:
            found[label] = BASELINE
        elif label not in found:
            used = sum(colour != BASELINE for colour in found.values())
            found[label] = PALETTE[used % len(PALETTE)]
    return found


def _damage(sheet: Sheet, colour: dict[str, str]) -> Iterator[Chart]:
    """KL against KV bytes: a line for each combination, over the budgets."""
    lines = []
    for label, rows in _by_label(sheet).items():
        known = sorted(
            (row.of_full, row.divergence.kl) for row in rows if row.divergence is not None
        )
        known = [(x, y) for x, y in known if y > 0]
        if known:
            composed = rows[0].point.stage == "composed"
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": safe(label),
                    "x": [100 * x for x, _ in known],
                    "y": [y for _, y in known],
                    "line": {"color": colour[label], "dash": "dot" if composed else "solid"},
                    "marker": {"size": 9, "symbol": "diamond" if composed else "circle"},
                }
            )
    if lines:
        x = titled("KV bytes of a sequence, % of the full cache (lower is better)", type="log")
        y = titled("KL, nats a position (lower is better)", type="log", exponentformat="power")
        text = "Dotted: compositions. Further down and to the left is better on both."
        yield Chart("damage", "Damage against memory", text, lines, _tall(layout(x, y)), wide=True)


def _speed(sheet: Sheet, colour: dict[str, str]) -> Iterator[Chart]:
    """Decode speed against KV bytes, of what was timed."""
    rows = [row for row in sheet.rows if row.speed is not None and row.speed.decode is not None]
    if len(rows) < 2:
        return
    marks = []
    for label, members in _grouped(rows).items():
        speeds = [row.speed for row in members if row.speed is not None]
        values = [speed.decode or 0.0 for speed in speeds]
        marks.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": safe(label),
                "x": [100 * row.of_full for row in members],
                "y": values,
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [
                        (s.decode_high or v) - v for s, v in zip(speeds, values, strict=True)
                    ],
                    "arrayminus": [
                        v - (s.decode_low or v) for s, v in zip(speeds, values, strict=True)
                    ],
                    "thickness": 1.2,
                    "color": colour[label],
                },
                "marker": {"size": 10, "color": colour[label]},
            }
        )
    x = titled("KV bytes of a sequence, % of the full cache", rangemode="tozero")
    y = titled("decoded tokens/s (higher is better)", rangemode="tozero")
    text = f"{sheet.asked.batch} sequences at once; bars are 95 % intervals of the repeats."
    yield Chart("speed", "Decode speed", text, marks, layout(x, y))


def _positions(sheet: Sheet, colour: dict[str, str]) -> Iterator[Chart]:
    """KL at each position behind the prompt, of the best at the smallest budget."""
    group = next((group for group in sheet.groups if group.budget is not None), None)
    if group is None:
        return
    lines = []
    for row in group.rows[:MOST_LINES]:
        found = row.divergence
        if found is not None and found.positions:
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": safe(row.point.label),
                    "x": list(range(1, len(found.positions) + 1)),
                    "y": list(found.positions),
                    "line": {"color": colour[row.point.label], "width": 1.5},
                }
            )
    if lines:
        x = titled("token behind the prompt")
        y = titled("KL, nats", rangemode="tozero")
        text = f"The nearest {len(lines)} at {group.title}: whether the damage grows."
        yield Chart("positions", "Damage by position", text, lines, layout(x, y))


def _capacity(sheet: Sheet, colour: dict[str, str]) -> Iterator[Chart]:
    """Sequences that fit, of what was timed."""
    rows = [row for row in sheet.rows if row.speed is not None and row.sequences]
    if not rows:
        return
    names = [safe(f"{row.point.label}, {_at(sheet, row)}") for row in rows]
    bars: Figure = {
        "type": "bar",
        "orientation": "h",
        "x": [row.sequences for row in rows][::-1],
        "y": names[::-1],
        "marker": {"color": [colour[row.point.label] for row in rows][::-1]},
        "text": [f"{row.sequences:,}" for row in rows][::-1],
    }
    x = titled(f"sequences of {sheet.asked.length} tokens at equal memory", rangemode="tozero")
    drawn = layout(x, titled("", type="category"), legend=False)
    drawn["height"] = 140 + 28 * len(rows)
    text = "Predicted from measured KV bytes alone: what the memory beside the weights holds."
    yield Chart("capacity", "Serving capacity", text, [bars], drawn, wide=True)


def _at(sheet: Sheet, row: Row) -> str:
    return next(group.title for group in sheet.groups if row in group.rows)


def _by_label(sheet: Sheet) -> dict[str, list[Row]]:
    return _grouped([row for row in sheet.rows if row.point.written])


def _grouped(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.point.label, []).append(row)
    return found


def _tall(drawn: Figure) -> Figure:
    return {**drawn, "height": 520}
