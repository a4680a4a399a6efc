"""The comparison on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvlab.platform.compare.calibration_sheet import calibration_sheets
from kvlab.platform.compare.controller_sheet import controller_sheets
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.sheets import Cell, Heading, Sheet, Tone, further_sheets, main_sheet
from kvlab.platform.compare.study_sheet import study_sheets
from kvlab.platform.compare.summary import summarise_in_words

STYLES: dict[Tone, str] = {
    "plain": "",
    "name": "bold",
    "better": "green",
    "worse": "red",
    "faint": "dim",
    "void": "yellow",
}


NAME_WIDTH = 38
"""Names of arms are folded beyond this, so that numbers stay in sight."""
WIDEST = 400
"""On a console wider than this, which no person looks at, names stay whole."""


def draw(comparison: Comparison, console: Console) -> None:
    """Print the tables, the summary in words and the notes, none wider than the console."""
    title = f"{comparison.name} (workflow {comparison.workflow_id}, {comparison.state})"
    console.print(Text(title, style="bold"))
    if comparison.arms and comparison.measured:
        for sheet in (main_sheet(comparison), *further_sheets(comparison)):
            console.print(_sheet(sheet, console))
    for sheet in (
        *calibration_sheets(comparison),
        *controller_sheets(comparison),
        *study_sheets(comparison),
    ):
        console.print(_sheet(sheet, console))
    for sentence in summarise_in_words(comparison):
        console.print(Text(f"• {sentence}"))
    if comparison.notes:
        console.print(Text("\nNotes", style="bold"))
        for note in comparison.notes:
            console.print(Text(f"• {note}", style="dim"))


def _sheet(sheet: Sheet, console: Console) -> RenderableType:
    """One table, or several that share the first column where the console is too narrow."""
    parts: list[RenderableType] = [Text(f"\n{sheet.title}", style="bold")]
    first, rest = 0, list(range(1, len(sheet.headings)))
    while rest:
        taken = 1
        while taken < len(rest) and _fits(sheet, [first, *rest[: taken + 1]], console):
            taken += 1
        parts.append(_table(sheet, [first, *rest[:taken]], console))
        rest = rest[taken:]
    if sheet.caption:
        parts.append(Padding(Text(sheet.caption, style="dim"), (0, 1), expand=False))
    parts += [Padding(Text(f"• {remark}"), (0, 1), expand=False) for remark in sheet.remarks]
    return Group(*parts)


def _fits(sheet: Sheet, columns: list[int], console: Console) -> bool:
    measured = Measurement.get(
        console, console.options.update(max_width=1000), _table(sheet, columns, console)
    )
    return measured.maximum <= console.width


def _table(sheet: Sheet, columns: list[int], console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), leading=1)
    for index in columns:
        table.add_column(
            _heading(sheet.headings[index]),
            justify="right" if index else "left",
            max_width=None if index or console.width > WIDEST else NAME_WIDTH,
        )
    for row in sheet.rows:
        table.add_row(*(_cell(row[index]) for index in columns))
    return table


def _heading(heading: Heading) -> Text:
    text = Text(heading.title, style="bold")
    return text.append(f"\n{heading.detail}", style="dim not bold") if heading.detail else text


def _cell(cell: Cell) -> Text:
    text = Text(overflow="fold")
    for index, line in enumerate(cell.lines):
        text.append(("\n" if index else "") + line.text, style=STYLES[line.tone])
    return text
