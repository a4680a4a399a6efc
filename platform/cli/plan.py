"""`kvlab plan`: what a workflow would do, without doing or writing anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

WIDTH = 160
"""Characters of a line where output is no terminal."""


def command(
    file: Annotated[Path, typer.Argument(help="A workflow YAML.", show_default=False)],
    address: Annotated[
        str | None, typer.Option("--address", help="The cluster it would run on; default: here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the jobs of a workflow: reusable, stale (and why) or to run, and what they will cost."""
    from kvlab.platform.home import Home
    from kvlab.platform.planning import plan, render
    from kvlab.platform.spec.read import load_graph

    home = Home.find()
    graph = load_graph(file, home=home.root, cluster=address)
    made = plan.make(graph, plan.look_up(graph, home.url))
    if as_json:
        print(json.dumps(render.as_json(made)))
        return
    from rich.console import Console

    render.show(made, Console(width=None if sys.stdout.isatty() else WIDTH))
