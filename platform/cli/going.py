"""What `run` and `resume` share: drive a workflow, show it, print its comparison."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvlab import KvlabError
from kvlab.db.states import JobState
from kvlab.platform.cli import before, live
from kvlab.platform.cli.console import console as make_console
from kvlab.platform.compare import check_place, show

if TYPE_CHECKING:
    from kvlab.platform.graph import Graph
    from kvlab.platform.home import Home


def go(
    home: Home,
    workflow: Graph | int,
    address: str | None,
    detach: bool,
    cpus: int | None,
    mlflow: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Run to the end, print, and exit with the code that says how it went."""
    console = make_console(stderr=as_json)
    if html is not None:
        check_place(html)
    if isinstance(workflow, int) and before.nothing_left(home, workflow, mlflow):
        live.say_done(home, workflow, as_json)
        return
    watch = partial(live.watching, console=console, quiet=as_json)
    if address is None:
        if detach:
            raise KvlabError("--detach needs --address: a local run ends with its command")
        before.look(home, workflow, cpus)
        from kvlab.platform.controller.launch import run_local

        outcome = run_local(home, workflow, watch, cpus=cpus, mlflow=mlflow)
    else:
        from kvlab.platform.controller import cluster
        from kvlab.platform.controller.access import connected

        with connected(address):
            remote = cluster.start(home, workflow, mlflow=mlflow)
            if detach:
                _say_detached(remote.workflow, as_json)
                return
            with watch(remote):
                outcome = remote.run()
    if outcome.counts.get(JobState.DONE) and not as_json:
        show(home, outcome.workflow, console, html=html, ended=True)
    live.finish(home, outcome, console, as_json)


def _say_detached(workflow: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"workflow": workflow, "state": "running"}))
    else:
        print(f"workflow {workflow} runs on the cluster: `kvlab status {workflow}` shows it")
