"""`kvlab run`: a workflow from its YAML to a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Cpus = Annotated[
    int | None, typer.Option("--cpus", min=1, help="CPUs that jobs may have; default: all.")
]
Mlflow = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Mirror to MLflow.")]
Report = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Where the report goes; default: report.html."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON at the end, and nothing before.")]
Address = Annotated[
    str | None,
    typer.Option("--address", help="A running Ray cluster; default: Ray on this machine alone."),
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Return at once; the workflow goes on on the cluster.")
]


def command(
    file: Annotated[Path, typer.Argument(help="A workflow YAML.", show_default=False)],
    address: Address = None,
    detach: Detach = False,
    cpus: Cpus = None,
    mlflow: Mlflow = True,
    html: Report = None,
    as_json: Json = False,
) -> None:
    """Run a workflow, locally or on a Ray cluster.

    Exits with 0 when every job is done, 1 when some failed, 2 for bad input, 130 when stopped.
    """
    from kvlab.platform.cli.going import go
    from kvlab.platform.home import Home
    from kvlab.platform.spec.read import load_graph

    home = Home.find()
    graph = load_graph(file, home=home.root, remember=True, cluster=address, cpus=cpus)
    go(home, graph, address, detach, cpus, mlflow, html, as_json)
