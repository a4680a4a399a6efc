"""`kvlab resume`: go on with what did not finish."""

from __future__ import annotations

from typing import Annotated

import typer

from kvlab.platform.cli.run import Address, Cpus, Detach, Json, Mlflow, Report


def command(
    workflow: Annotated[
        str | None,
        typer.Argument(help="Name (its newest run) or number; without: the newest."),
    ] = None,
    address: Address = None,
    detach: Detach = False,
    cpus: Cpus = None,
    mlflow: Mlflow = True,
    html: Report = None,
    as_json: Json = False,
) -> None:
    """Go on with a workflow that stopped, failed or was cancelled, or whose controller died.

    Finished jobs are kept; interrupted ones continue from their newest checkpoint. Exits as `run`.
    """
    from kvlab.platform.cli.going import go
    from kvlab.platform.cli.which import find
    from kvlab.platform.home import Home

    home = Home.find()
    go(home, find(home, workflow), address, detach, cpus, mlflow, html, as_json)
