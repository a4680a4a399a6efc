"""`kvlab compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    workflow: Annotated[
        str | None, typer.Argument(help="Name (its newest run) or number; default: the newest.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a report.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the finished jobs of a workflow: table, JSON or HTML."""
    from kvlab.platform.cli.console import console
    from kvlab.platform.cli.which import find
    from kvlab.platform.compare import show
    from kvlab.platform.home import Home

    home = Home.find()
    show(home, find(home, workflow), console(), html=html, as_json=as_json)
