"""The mirror that optuna-dashboard shows, beside a real store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kvlab import KvlabError
from kvlab.db.rows import Lease
from kvlab.db.store import Store
from kvlab.platform.controller.jobs import new_job
from kvlab.platform.search.dashboard import Mirror, serve
from kvlab.platform.spec.read import load_graph

YAML = """
version: 1
name: mirrored
jobs:
  best:
    search:
      trial: {noop: {points: 2}}
      space: {noop.points: {int: [1, 40]}}
      objectives: {noop.points: minimize}
"""


def told(number: int, state: str, points: int, **beside: Any) -> dict[str, Any]:
    objectives = {"noop.points": float(points)} if state == "complete" else {}
    return {
        "number": number, "values": {"noop.points": points}, "state": state,
        "objectives": objectives, "constraints": {}, "source": "sampler", "same_as": None, **beside,
    }  # fmt: skip


def test_it_follows_what_is_stored(tmp_path: Path) -> None:
    graph = load_graph(YAML)
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as store:
        mirror = Mirror(store)
        assert mirror.refresh() == 0
        with pytest.raises(KvlabError, match="there is no study yet"):
            serve(store, 0, print)
        number = store.create_workflow(
            graph.name, YAML, {}, [new_job(cell) for cell in graph.cells], time.time()
        )
        lease: Lease = store.claim(number, "test", 60.0, time.time())
        (job,) = [row.id for row in store.load(number).jobs]

        def say(*trials: dict[str, Any]) -> None:
            with store.batch(lease, time.time()) as batch:
                for trial in trials:
                    batch.event("trial", job, 1, trial)

        say(told(0, "running", 7), told(0, "complete", 7), told(1, "running", 9))
        assert mirror.refresh() == 1
        (study,) = mirror.storage.get_all_studies()
        assert study.study_name == "best (workflow 1)"

        def seen() -> list[tuple[str, dict[str, Any]]]:
            trials = mirror.storage.get_all_trials(study._study_id)
            return [(trial.state.name, trial.params) for trial in trials]

        assert seen() == [("COMPLETE", {"noop.points": 7})]
        say(told(1, "failed", 9), told(2, "complete", 7, same_as=0))
        mirror.refresh()
        mirror.refresh()
        assert seen() == [("COMPLETE", {"noop.points": 7}), ("FAIL", {"noop.points": 9})]
