"""The bench as a text table: absolute numbers on both sides of every ratio."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.platform.bench.line import Line

HEADER = ("what", "kvlab", "beside it", "ratio", "target", "")


def render(lines: Sequence[Line]) -> str:
    """Return the table; a void line shows its reason and no ratio."""
    rows = [HEADER, *(cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def cells(line: Line) -> tuple[str, ...]:
    """One row of the table."""
    beside = "" if line.theirs is None else f"{number(line.theirs)} ({line.beside})"
    wanted = []
    if line.least_ratio is not None:
        wanted.append(f">= {line.least_ratio:g}x")
    if line.limit is not None:
        wanted.append(f"{'>=' if line.better == 'more' else '<='} {line.limit:g} {line.unit}")
    verdict = {None: "", True: "met", False: "MISSED"}[line.met]
    return (
        line.name,
        f"{number(line.ours)} {line.unit}",
        beside,
        "" if line.ratio is None else f"{line.ratio:.2f}x",
        ", ".join(wanted),
        f"VOID: {line.void}" if line.void else verdict,
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.5f}"
