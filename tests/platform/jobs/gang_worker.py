"""One rank of a gang, started by test_gang.py: run a train job and print what it logged."""

import json
import sys
from pathlib import Path

from kvlab.platform.jobs.context import Stopped
from kvlab.platform.jobs.local import LocalContext
from kvlab.platform.jobs.train.run import run as train
from kvlab.platform.jobs.uptrain.run import run as uptrain

asked = json.loads(sys.argv[1])
for job in asked["jobs"]:
    context = LocalContext(
        folder=Path(job["folder"]) if asked["rank"] == 0 else Path(job["folder"] + "-other"),
        inputs={role: Path(folder) for role, folder in asked["inputs"].items()},
        rank=asked["rank"],
        workers=asked["workers"],
        rendezvous=job["rendezvous"],
        checkpoints=Path(job["checkpoints"]) if "checkpoints" in job else None,
        stop_after=job.get("stop_after"),
    )
    context.folder.mkdir(exist_ok=True)
    try:
        result = (train if "model" in job["spec"] else uptrain)(job["spec"], context)
    except Stopped:
        result = "stopped"
    points = [[key, step, value] for (key, step), value in context.points.items()]
    print(json.dumps({"result": result, "points": points}), flush=True)
