"""`kvlab cancel`: end a workflow, whichever process runs it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Annotated

import typer


def command(
    workflow: Annotated[str, typer.Argument(help="Name (its newest run) or number.")],
    address: Annotated[
        str | None,
        typer.Option("--address", help="The Ray cluster where its controller died, if it did."),
    ] = None,
) -> None:
    """Cancel a workflow: running jobs are ended at once, the rest never begins."""
    from kvlab.db.store import Store
    from kvlab.platform.cli.which import find
    from kvlab.platform.controller.cancel import cancel
    from kvlab.platform.home import Home

    home = Home.find()
    number = find(home, workflow)
    with ExitStack() as stack:
        if address is not None:
            from kvlab.platform.controller.access import connected

            stack.enter_context(connected(address))
        left = cancel(stack.enter_context(Store.open(home.url)), number)
        if address is not None:
            from kvlab.platform.controller.cluster import sweep

            sweep(home, number)
            left = []
    print(f"workflow {number} cancelled")
    if left:
        print(
            f"its controller was gone; {', '.join(left[:3])} may go on where they ran: "
            f"`kvlab cancel {number} --address HOST:PORT` ends them on a cluster",
            file=sys.stderr,
        )
