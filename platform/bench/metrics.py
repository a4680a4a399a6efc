"""What a metric point costs: where a job reports it, and on its way into SQL; beside MLflow."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from time import perf_counter

from kvlab.db.rows import NewJob
from kvlab.db.store import Store
from kvlab.platform.bench.line import Line, middle
from kvlab.platform.home import Home
from kvlab.platform.record.recorder import Tail
from kvlab.platform.record.spool import CHUNK, SpoolWriter
from kvlab.platform.worker.context import JobContext
from kvlab.platform.worker.message import Assignment

CALLS = 20_000
MLFLOW_CALLS = 300
REPEATS = 3
TTL_SECONDS = 3600.0


def run() -> list[Line]:
    """Measure `context.log`, spool to SQL, and MLflow's `log_metric` on its own SQLite."""
    calls: list[float] = []
    ours: list[float] = []
    theirs: list[float] = []
    void = ""
    with tempfile.TemporaryDirectory() as folder:
        home = Home.find(Path(folder) / "home", f"sqlite:///{folder}/kvlab.db")
        home.create()
        with Store.open(home.url) as store:
            for repeat in range(REPEATS):
                spool = home.spool(repeat, 1)
                calls += log_seconds(home, spool)
                rate, stored = store_rate(store, spool, f"bench {repeat}")
                ours.append(rate)
                if stored != CALLS:
                    void = f"{stored} of {CALLS} points were found in SQL"
        theirs, found = mlflow_rates(Path(folder))
        if found != MLFLOW_CALLS:
            void = f"{found} of {MLFLOW_CALLS} points were found in MLflow"
    calls.sort()
    return [
        Line(
            "a metric call in a job (median)",
            "µs",
            middle(calls) * 1e6,
            better="less",
            limit=50.0,
            detail={"p99_us": calls[int(len(calls) * 0.99)] * 1e6, "calls": len(calls)},
        ),
        Line(
            "metric points into SQL",
            "points/s",
            middle(ours),
            middle(theirs),
            beside="MLflow log_metric, SQLite",
            limit=5_000.0,
            least_ratio=10.0,
            void=void,
            detail={"ours": ours, "theirs": theirs},
        ),
    ]


def log_seconds(home: Home, path: Path) -> list[float]:
    """Seconds of every `context.log` call of a job that reports as fast as it can."""
    assignment = Assignment(1, 1, 1, "bench", "noop", {}, "bench", {})
    spool = SpoolWriter(path)
    context = JobContext(assignment, home, spool)
    times = []
    for step in range(CALLS):
        start = perf_counter()
        context.log({"loss": 1.0 / (step + 1)}, step)
        times.append(perf_counter() - start)
    spool.close()
    return times


def store_rate(store: Store, spool: Path, name: str) -> tuple[float, int]:
    """Read a spool into SQL as the recorder does; return points per second, and points found."""
    job = NewJob(name, "bench", "noop", {}, {}, {}, (), name, {})
    workflow = store.create_workflow(name, "", {}, [job], time.time())
    (row,) = store.load(workflow).jobs
    lease = store.claim(workflow, name, TTL_SECONDS, time.time())
    with store.batch(lease, time.time()) as batch:
        attempt = batch.start(row.id, "bench")
    tail = Tail(row.id, attempt)
    data = spool.read_bytes()
    start = perf_counter()
    for offset in range(0, len(data), CHUNK):
        # A piece ends anywhere: what follows its last newline is read again with the next one.
        tail.take(tail.offset, data[tail.offset : offset + CHUNK])
        with store.batch(lease, time.time()) as batch:
            tail.write(batch)
        tail.committed()
    elapsed = perf_counter() - start
    return CALLS / elapsed, len(store.points(row.id))


def mlflow_rates(folder: Path) -> tuple[list[float], int]:
    """Points per second of MLflow's client, one call a point, and points it then has."""
    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("bench", artifact_location=(folder / "files").as_uri())
    rates, found = [], 0
    for _ in range(REPEATS):
        run_id = client.create_run(experiment).info.run_id
        client.log_metric(run_id, "warm", 0.0, step=0)
        start = perf_counter()
        for step in range(MLFLOW_CALLS):
            client.log_metric(run_id, "loss", 1.0 / (step + 1), step=step)
        rates.append(MLFLOW_CALLS / (perf_counter() - start))
        found = len(client.get_metric_history(run_id, "loss"))
    return rates, found
