"""The sheet of a try on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvlab.platform.compare.formats import seconds_text
from kvlab.platform.trying.row import Row
from kvlab.platform.trying.sheet import Sheet

MARKS = {"best": "★", "tied": "≈", "": " "}
NONE = "—"


def draw(sheet: Sheet) -> RenderableType:
    """The table by budget; columns that no row has are left out."""
    columns = [one for one in COLUMNS if any(one[1](row) != NONE for row in sheet.rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for number, group in enumerate(sheet.groups):
        if number:
            table.add_section()
        table.add_row(Text(group.title, "bold cyan"))
        for row in group.rows:
            name = Text(
                f"{MARKS[row.mark]} {row.point.label}", "bold" if row.mark == "best" else ""
            )
            if row.failed:
                table.add_row(name, Text("failed", "red"))
            else:
                table.add_row(name, *(Text(show(row)) for _, show in columns))
    return Lines(table)


def kl_text(row: Row) -> str:
    if row.divergence is None:
        return NONE
    return number(row.divergence.kl)


def number(value: float) -> str:
    """Three significant digits, and no exponent where it can be read without."""
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-4 <= abs(value) < 1e4 else f"{value:.1e}"


def _agreement(row: Row) -> str:
    return NONE if row.divergence is None else share(row.divergence.agreement)


def _identical(row: Row) -> str:
    found = row.divergence
    if found is None:
        return NONE
    return f"{found.identical:.1f} of {found.of}"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _recall(row: Row) -> str:
    return NONE if row.recall is None else _answered(row.recall.single)


def _turns(row: Row) -> str:
    return NONE if row.recall is None else _answered(row.recall.turns)


def _answered(found: float | None) -> str:
    return "void" if found is None else share(found)


def bytes_text(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _kv(row: Row) -> str:
    about = "~" if row.predicted else ""
    return f"{about}{bytes_text(row.kv_bytes)}"


def _of_full(row: Row) -> str:
    return f"{'↑' if row.over else ''}{100 * row.of_full:.3g} %"


def _prefill(row: Row) -> str:
    if row.speed is None:
        return NONE
    return seconds_text(row.speed.prefill) + ("*" if row.speed.void else "")


def _decode(row: Row) -> str:
    if row.speed is None or row.speed.decode is None:
        return NONE
    return f"{row.speed.decode:,.0f}" + ("*" if row.speed.void else "")


def _sequences(row: Row) -> str:
    return "0" if row.sequences is None else f"{row.sequences:,}"


def _served(row: Row) -> str:
    return NONE if row.served is None else f"{row.served:,}"


COLUMNS = (
    ("KL", kl_text),
    ("top-1", _agreement),
    ("identical", _identical),
    ("recall", _recall),
    ("2nd turn", _turns),
    ("KV/sequence", _kv),
    ("of full", _of_full),
    ("prefill", _prefill),
    ("decode tok/s", _decode),
    ("sequences", _sequences),
    ("in vLLM", _served),
)
"""Heading, and what stands under it for a row."""
