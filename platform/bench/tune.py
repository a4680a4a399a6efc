"""The other side of the jobs bench: Ray Tune at its fastest, with trials that do nothing."""

from __future__ import annotations

import os
import tempfile
from time import perf_counter
from typing import Any

from ray import tune
from ray.tune import RunConfig, Trainable, TuneConfig, Tuner


class NoOp(Trainable):
    """A trial that is over at its first step; its actor takes the next trial."""

    def step(self) -> dict[str, Any]:
        return {"score": 0.0, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: object) -> None:
        return None


def trial_rate(trials: int, concurrency: int) -> tuple[float, int]:
    """Run the trials; return trials per second, and how many ended well."""
    # Its own switch for "no callbacks": result files, TensorBoard and the like.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(
            tune.with_resources(NoOp, {"cpu": 1}),
            param_space={"number": tune.grid_search(list(range(trials)))},
            tune_config=TuneConfig(reuse_actors=True, max_concurrent_trials=concurrency),
            run_config=RunConfig(storage_path=folder, callbacks=[], verbose=0),
        )
        start = perf_counter()
        results = tuner.fit()
        elapsed = perf_counter() - start
    return trials / elapsed, len(results) - results.num_errors
