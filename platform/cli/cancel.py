"""`kvlab cancel`: end a workflow, whichever process runs it."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    workflow: Annotated[str, typer.Argument(help="Name (its newest run) or number.")],
) -> None:
    """Cancel a workflow: running jobs are ended at once, the rest never begins."""
    from kvlab.db.store import Store
    from kvlab.platform.cli.which import find
    from kvlab.platform.controller.cancel import cancel
    from kvlab.platform.home import Home

    home = Home.find()
    number = find(home, workflow)
    with Store.open(home.url) as store:
        cancel(store, number)
    print(f"workflow {number} cancelled")
