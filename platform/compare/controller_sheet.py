"""The table of who tells which tokens matter."""

from __future__ import annotations

from kvlab.platform.compare.controllers import Guess
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.sheets import Cell, Heading, Line, Sheet


def controller_sheets(comparison: Comparison) -> list[Sheet]:
    """One table for each label job, a row for each controller and rule; none without any."""
    labels = dict.fromkeys(guess.labels for guess in comparison.guesses)
    return [_sheet([g for g in comparison.guesses if g.labels == name]) for name in labels]


def _sheet(guesses: list[Guess]) -> Sheet:
    kept = sorted({m for guess in guesses for m in guess.recall})
    headings = (
        Heading("who says what matters"),
        *(Heading(f"recall at {m}", "labelled tokens among its best") for m in kept),
        Heading("parameters"),
    )
    title = f"{guesses[0].labels}: the {guesses[0].top} most attended tokens, held-out texts"
    best = {m: max(guess.recall.get(m, 0.0) for guess in guesses) for m in kept}
    rows = []
    for guess in guesses:
        shares = [
            Cell(
                (
                    Line(
                        f"{share:.1%}".replace("%", " %"), "better" if share == best[m] else "plain"
                    ),
                )
            )
            for m in kept
            if (share := guess.recall.get(m)) is not None
        ]
        size = "—" if guess.parameters is None else f"{guess.parameters:,}"
        name = Cell((Line(guess.id), Line("controller" if guess.learned else "rule", "faint")))
        rows.append((name, *shares, Cell((Line(size),))))
    return Sheet(title, "", headings, tuple(rows))
