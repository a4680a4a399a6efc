"""Runs a stored workflow on a running Ray in a process of its own, so that a test can lose it.

    python drive.py HOME URL WORKFLOW ADDRESS

With KVLAB_FAULT_MARK its workers inherit the fault, as those of a local run do.
"""

import json
import os
import sys

import ray

from kvlab.db.store import Store
from kvlab.platform.controller.controller import Controller
from kvlab.platform.home import Home

FAULT = ("KVLAB_FAULT", "KVLAB_FAULT_MARK")


def main(root: str, url: str, workflow: str, address: str) -> None:
    handed_on = {name: os.environ[name] for name in FAULT if name in os.environ}
    ray.init(
        address,
        namespace="kvlab",
        log_to_driver=False,
        logging_level="ERROR",
        # Costs seconds, and a fault without a mark is the controller's.
        runtime_env={"env_vars": handed_on} if FAULT[1] in handed_on else None,
    )
    with Store.open(url) as store:
        outcome = Controller(Home.find(root, url), store, int(workflow)).run()
    print(json.dumps({"state": outcome.state}))


if __name__ == "__main__":
    main(*sys.argv[1:])
