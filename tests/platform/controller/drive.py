"""Runs a stored workflow on a running Ray in a process of its own, so that a test can lose it.

    python drive.py HOME URL WORKFLOW ADDRESS [LABEL]

With LABEL as a controller on a cluster: its workers, named by it, outlive it. With KVLAB_FAULT_MARK
its workers inherit the fault, as those of a local run do; with DRIVE_MIRROR it feeds MLflow.
"""

import json
import os
import sys

import ray

from kvlab.db.store import Store
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.launch import mirror_of
from kvlab.platform.controller.pool import Pool
from kvlab.platform.home import Home

FAULT = ("KVLAB_FAULT", "KVLAB_FAULT_MARK")


def main(root: str, url: str, workflow: str, address: str, label: str = "") -> None:
    handed_on = {name: os.environ[name] for name in FAULT if name in os.environ}
    ray.init(
        address,
        namespace="kvlab",
        log_to_driver=False,
        logging_level="ERROR",
        # Costs seconds, and a fault without a mark is the controller's.
        runtime_env={"env_vars": handed_on} if FAULT[1] in handed_on else None,
    )
    home = Home.find(root, url)
    mirror = mirror_of(home) if "DRIVE_MIRROR" in os.environ else None
    pool = Pool(home, detached=True, label=label) if label else None
    with Store.open(url) as store:
        controller = Controller(
            home, store, int(workflow), detached=bool(label), pool=pool, mirror=mirror
        )
        outcome = controller.run()
    print(json.dumps({"state": outcome.state}))


if __name__ == "__main__":
    main(*sys.argv[1:])
