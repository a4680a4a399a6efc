"""`kvlab plan`: what a workflow would do, without doing or writing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="A workflow YAML.", show_default=False)],
    address: Annotated[
        str | None, typer.Option("--address", help="The cluster it would run on; default: here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the jobs of a workflow: reusable, stale (and why) or to run, and what they will cost."""
    from kvlab.platform.cli.console import console
    from kvlab.platform.home import Home
    from kvlab.platform.planning import plan, render
    from kvlab.platform.spec.read import load_graph

    home = Home.find()
    graph = load_graph(file, home=home.root, cluster=address)
    made = plan.make(graph, plan.look_up(graph, home.url))
    if as_json:
        print(json.dumps(render.as_json(made)))
        return
    render.show(made, console())
