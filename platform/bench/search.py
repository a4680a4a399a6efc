"""How long a worker waits for a point, and the sampler for its own; beside Optuna's storages."""

from __future__ import annotations

import importlib
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlab.platform.bench.line import Line, middle, seconds
from kvlab.platform.search.broker import Broker
from kvlab.platform.search.proposals import Proposals
from kvlab.platform.search.rows import Direction, Row
from kvlab.platform.search.samplers import build
from kvlab.platform.search.space import Dimension, Space, Values

if TYPE_CHECKING:
    from optuna import Study

ASKERS = 16
TOLD = 1000
ROUNDS = 3
"""Points that each thread asks for, after one that is not counted."""
TRIAL_SECONDS = 5.0
"""What a trial takes; all workers ask at nearly the same time. Points ahead are there again if this
is more than the sampler's own time (a line of its own) for each of them."""
OWN = 20
SAMPLERS = ("tpe", "random")
OBJECTIVES: dict[str, Direction] = {
    "perplexity": "minimize",
    "kv_bytes_per_token": "minimize",
    "tokens_per_second": "maximize",
}
SPACE = Space(
    [
        Dimension("eviction", "categorical", choices=("squeeze_attention", "h2o", "adore")),
        Dimension("squeeze_attention.p", "float", 0.1, 0.9, when=("eviction", frozenset({0}))),
        Dimension("h2o.recent", "float", 0.0, 1.0, when=("eviction", frozenset({1}))),
        Dimension("adore.rebuild", "int", 1, 64, log=True, when=("eviction", frozenset({2}))),
        Dimension("uniform.share", "float", 0.05, 1.0, log=True),
    ]
)


@dataclass(slots=True)
class Waits:
    """Seconds of every call that counted."""

    ask: list[float] = field(default_factory=list)
    tell: list[float] = field(default_factory=list)


def run() -> list[Line]:
    """Medians of all threads' calls, ours and Optuna's on the same space, sampler and trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lines: list[Line] = []
    for sampler in SAMPLERS:
        past = trials(TOLD)
        ours = broker_waits(sampler, past)
        proposals = Proposals(SPACE, OBJECTIVES, sampler, 0, past)
        own = [seconds(partial(give_up, proposals)) for _ in range(OWN)]
        for kind, url in storages():
            with url() as address:
                study = stored(address, sampler, past)
                theirs = study_waits(study)
                alone = [seconds(partial(give_up_stored, study)) for _ in range(OWN)]
            setting = f"{sampler}, {TOLD:,} trials told"
            beside = f"Optuna on {kind}"
            lines += [
                compared(f"ask, {ASKERS} threads, {setting}", ours.ask, theirs.ask, beside, 10.0),
                compared(f"tell, {ASKERS} threads, {setting}", ours.tell, theirs.tell, beside),
                compared(f"sampler's own time, {setting}", own, alone, beside),
            ]
    return lines


def compared(
    name: str, ours: list[float], theirs: list[float], beside: str, limit: float | None = None
) -> Line:
    """One line, in milliseconds."""
    mine, others = ([1000 * wait for wait in waits] for waits in (ours, theirs))
    return Line(
        name,
        "ms",
        middle(mine),
        middle(others),
        beside=beside,
        better="less",
        limit=limit,
        detail={"ours": mine, "theirs": others, "trial_seconds": TRIAL_SECONDS},
    )


def trials(number: int) -> list[Row]:
    """As many ended trials at random points."""
    drawn = Proposals(SPACE, OBJECTIVES, "random", 1)
    found = []
    for each in range(number):
        proposal = drawn.ask()
        found.append(Row(each, proposal.values, "complete", measured(proposal.values)))
    return found


def measured(values: Values) -> dict[str, float]:
    """Smooth objectives that pull apart."""
    share: float = values["uniform.share"]
    settings = ("squeeze_attention.p", "h2o.recent")
    setting: float = next((values[path] for path in settings if path in values), 0.5)
    rebuilt: float = values["adore.rebuild"] / 64 if "adore.rebuild" in values else 0.0
    noise = random.Random(repr(values)).gauss(0, 0.01)
    return {
        "perplexity": 20 / (1 + share) + (setting - 0.4) ** 2 - rebuilt + noise,
        "kv_bytes_per_token": share,
        "tokens_per_second": 1 / (0.2 + share + rebuilt),
    }


def broker_waits(sampler: str, past: list[Row]) -> Waits:
    """Let all threads ask a broker and tell it."""
    broker = Broker(
        SPACE, OBJECTIVES, len(past) + ASKERS * (ROUNDS + 1), sampler=sampler, ahead=ASKERS
    )
    broker.restore(past)

    def ask() -> tuple[int, dict[str, float]]:
        found = broker.ask()
        assert found is not None
        return found.number, measured(dict(found.values))

    with broker:
        return at_once(ask, lambda asked: broker.tell(*asked))


def study_waits(study: Study) -> Waits:
    """Let all threads ask Optuna's study and tell it, as its own `optimize` would."""

    def ask() -> tuple[Any, list[float]]:
        trial = study.ask()
        return trial, list(measured(SPACE.suggest(trial)).values())

    return at_once(ask, lambda asked: study.tell(*asked))


def at_once(ask: Callable[[], Any], tell: Callable[[Any], object]) -> Waits:
    """Time each call of every thread; the first round is warm-up."""
    waits = Waits()
    barrier = threading.Barrier(ASKERS)

    def work() -> None:
        barrier.wait()
        for number in range(ROUNDS + 1):
            start = time.perf_counter()
            asked = ask()
            waited = time.perf_counter() - start
            time.sleep(TRIAL_SECONDS)
            told = seconds(partial(tell, asked))
            if number:
                waits.ask.append(waited)
                waits.tell.append(told)

    threads = [threading.Thread(target=work) for _ in range(ASKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waits


def give_up(proposals: Proposals) -> None:
    """Ask for one point with nobody beside, and end its trial."""
    proposals.refuse(proposals.ask())


def give_up_stored(study: Study) -> None:
    """Do the same in Optuna's own study."""
    from optuna.trial import TrialState

    trial = study.ask()
    SPACE.suggest(trial)
    study.tell(trial, state=TrialState.FAIL)


def stored(url: str, sampler: str, past: list[Row]) -> Study:
    """Optuna's study of the same trials in a database."""
    import optuna
    from optuna.trial import create_trial

    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_size": ASKERS}
    study = optuna.create_study(
        storage=optuna.storages.RDBStorage(url, engine_kwargs=waits),
        sampler=build(sampler, SPACE, objectives=len(OBJECTIVES), seed=0),
        directions=list(OBJECTIVES.values()),
    )
    for row in past:
        params, distributions = SPACE.encode(dict(row.values))
        values = list(row.objectives.values())
        study.add_trial(create_trial(values=values, params=params, distributions=distributions))
    return study


def storages() -> Iterator[tuple[str, Callable[[], Any]]]:
    """SQLite, and PostgreSQL where pgserver is installed."""
    yield "SQLite", sqlite
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a container it has no runtime directory
            importlib.import_module("pgserver")
    except ImportError:
        return
    yield "PostgreSQL", postgres


@contextmanager
def sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{Path(folder) / 'study.db'}"


@contextmanager
def postgres() -> Iterator[str]:
    pgserver = importlib.import_module("pgserver")
    server = pgserver.get_server(tempfile.mkdtemp(prefix="kvlab-pg-"), cleanup_mode="delete")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()
