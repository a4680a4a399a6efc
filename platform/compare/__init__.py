"""From a workflow's stored results to one comparison: a table, JSON, or report.html."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvlab import KvlabError

if TYPE_CHECKING:
    from rich.console import Console

    from kvlab.db.states import WorkflowState
    from kvlab.db.store import Store
    from kvlab.platform.compare.model import Comparison
    from kvlab.platform.home import Home


class CompareError(KvlabError):
    """There is nowhere to write the report."""


def show(
    home: Home,
    workflow_id: int,
    console: Console | None = None,
    html: Path | None = None,
    as_json: bool = False,
    ended: bool = False,
) -> Comparison:
    """Print a stored workflow's comparison; also write the report where `html` says so.

    Args:
        console: where to print; None is standard output.
        as_json: print JSON instead of the table.
        ended: a run just ended: its report is written if some arm has a number, without `html`
            where `default_place` says.

    Raises:
        CompareError: the report cannot be written. StoreError: no such store or workflow.
    """
    from rich.console import Console

    from kvlab.db.store import Store
    from kvlab.platform.compare.build import compare
    from kvlab.platform.compare.table import draw

    console = console or Console()
    with Store.open(home.url, read_only=True) as store:
        comparison = compare(store.load(workflow_id))
        if ended:
            html = _place(html, comparison)
        if html is not None:
            check_place(html)
            _write(html, _rendered(store, comparison))
    if as_json:
        # Not through the console's markup or wrapping: a machine reads this.
        console.file.write(json.dumps(comparison.to_json(), indent=2, allow_nan=False) + "\n")
    else:
        draw(comparison, console)
        if html is not None:
            console.print(f"\nReport: {html}", markup=False, highlight=False, soft_wrap=True)
    return comparison


def check_place(html: Path) -> None:
    """Raise a CompareError where no report can be: said before hours are spent on it."""
    if not html.parent.is_dir():
        raise CompareError(
            f"the report cannot be written to {html}: there is no folder {html.parent}: "
            "make it, or name another file"
        )


def _place(html: Path | None, comparison: Comparison) -> Path | None:
    """Where the report of a run that ended goes; None: there is nothing to report."""
    from kvlab.platform.compare.place import default_place

    if not (comparison.measured or _beside(comparison)):
        return None
    return html or default_place(comparison.name, comparison.workflow_id)


def _beside(comparison: Comparison) -> bool:
    """Whether there is anything to show beside the arms."""
    return bool(comparison.calibrations or comparison.guesses or comparison.studies)


def report_of(store: Store, workflow_id: int, state: WorkflowState | None = None) -> str | None:
    """Return report.html of a stored workflow; None when it measures no model.

    Args:
        state: how the workflow is about to end, where its row does not say so yet.
    """
    from kvlab.platform.compare.build import compare

    comparison = compare(store.load(workflow_id))
    if not (comparison.arms or _beside(comparison)):
        return None
    if state is not None:
        comparison = replace(comparison, state=state.value)
    return _rendered(store, comparison)


def _rendered(store: Store, comparison: Comparison) -> str:
    from kvlab.platform.compare.curves import read_curves
    from kvlab.platform.compare.report import render

    return render(comparison, read_curves(store, comparison))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompareError(
            f"the report cannot be written to {path} ({error.strerror}): name another file"
        ) from error
