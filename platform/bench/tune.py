"""The other side of the jobs bench: Ray Tune at its fastest, with trials that do nothing."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from ray import tune
from ray.tune import RunConfig, Trainable, TuneConfig, Tuner


class NoOp(Trainable):
    """A trial that is over at its first step; its actor takes the next trial."""

    def step(self) -> dict[str, Any]:
        return {"at": time.time(), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: object) -> None:
        return None


def trial_rate(trials: int, concurrency: int) -> tuple[float, int]:
    """Run the trials; return trials per second, and how many ended well.

    The rate is that between the first trial's end and the last one's: what Tune needs to start its
    actors, which the other side keeps warm, is not held against it.
    """
    # Its own switch for "no callbacks": result files, TensorBoard and the like.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(
            tune.with_resources(NoOp, {"cpu": 1}),
            param_space={"number": tune.grid_search(list(range(trials)))},
            tune_config=TuneConfig(reuse_actors=True, max_concurrent_trials=concurrency),
            run_config=RunConfig(storage_path=folder, callbacks=[], verbose=0),
        )
        results = tuner.fit()
        times = [(results[i].metrics or {})["at"] for i in range(len(results))]
    return (trials - 1) / (max(times) - min(times)), len(results) - results.num_errors
