"""`kvlab ui`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer


def command(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where to listen.")] = 5000,
    studies: Annotated[
        bool, typer.Option("--studies", help="Searches in optuna-dashboard instead.")
    ] = False,
) -> None:
    """Open MLflow's user interface on the store, at 127.0.0.1 only. Ctrl-C ends it."""
    from kvlab.platform.home import Home
    from kvlab.platform.tracking.ui import serve

    if studies:
        from kvlab.db.store import Store
        from kvlab.platform.search import dashboard

        with Store.open(Home.find().url, read_only=True) as store:
            dashboard.serve(store, port, lambda line: print(line, flush=True))
        return
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the server must not be left behind
        signal.signal(number, signal.default_int_handler)
    serve(Home.find().tracking_uri, port, lambda line: print(line, flush=True))
