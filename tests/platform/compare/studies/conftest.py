"""Studies as the controller leaves them: rows of every trial's jobs, and a result."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from kvlab.db.states import Cause
from kvlab.db.store import Store
from kvlab.platform.compare import report_of
from kvlab.platform.compare.build import compare
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.table import draw
from kvlab.platform.search.broker import Broker
from kvlab.platform.search.importance import importances
from kvlab.platform.search.outcome import Done, Measured, excess, limit_text, measured
from kvlab.platform.search.rows import Row
from kvlab.platform.search.space import Dimension, Space


class Search:
    """A study of `lab` whose trials are measured as its models are; `done` gives it its result.

    Its spec and result are what the controller stores: numbers, front and importances come from the
    code that finds them.
    """

    SPACE = (
        Dimension("squeeze_attention.p", "float", 0.1, 0.9),
        Dimension("squeeze_attention.share", "float", 0.1, 0.6, log=True),
        Dimension("evaluate.dtype", "categorical", choices=("float32", "bfloat16")),
    )

    def __init__(
        self,
        lab: Any,
        objectives: Mapping[str, str],
        limits: Sequence[tuple[str, str, float, bool]] = (),
        *,
        name: str = "best",
        seeds: Sequence[int] = (0, 1),
        baseline: bool = False,
        asked: int = 6,
    ) -> None:
        self.lab, self.name, self.seeds, self.asked = lab, name, seeds, asked
        self.objectives, self.rows, self.base = dict(objectives), [], {}
        keys = ("metric", "sign", "number", "of_baseline")
        self.limits = [dict(zip(keys, limit, strict=True)) for limit in limits]
        role = {"baseline": "base[seed={}]"} if baseline else {}
        arms = [{"seed": s, "parents": {r: of.format(s) for r, of in role.items()}} for s in seeds]
        space = [{**asdict(dimension), "when": None} for dimension in self.SPACE]
        spec = {"space": space, "objectives": self.objectives, "constraints": self.limits}
        spec |= {"trials": asked, "sampler": "tpe", "seed": 0, "parallel": 2, "arms": arms}
        lab.add(name, name, "search", spec, {"seed": seeds[0]}, {"data": "data"}, None)
        if baseline:
            self.base = self._measured("baseline", 3.5, 100.0, 4096.0, {})

    def trial(
        self,
        p: float,
        share: float,
        loss: float,
        speed: float = 100.0,
        kv: float = 4096.0,
        dtype: str = "float32",
        **more: Any,
    ) -> None:
        """Run a point. more: `fails`, why its second evaluation does; what `benchmark` takes."""
        values = {"squeeze_attention.p": p, "squeeze_attention.share": share}
        row = Row(len(self.rows), {**values, "evaluate.dtype": dtype})
        apply = {"budget": {"squeeze_attention": {"p": p, "share": share}}}
        found = self._measured(str(row.number), loss, speed, kv, apply, **more)
        numbers = {name: one.value for name, one in found.items()}
        shown = {name: one.to_dict() for name, one in found.items()}
        if why := more.get("fails"):
            said = f"{self.name}/{row.number}/evaluate[seed={self.seeds[-1]}]: {why}"
            self.rows.append({**asdict(replace(row, state="failed")), "message": said})
        else:
            beyond = {
                limit_text(limit): excess(limit, numbers, self._bound(limit))
                for limit in self.limits
            }
            wanted = {name: numbers[name] for name in self.objectives}
            row = replace(row, state="complete", objectives=wanted, constraints=beyond)
            self.rows.append({**asdict(row), "message": None})
        self.rows[-1]["measured"] = shown

    def repeat(self, first: int) -> None:
        """Have a point proposed again that was run."""
        again = {"number": len(self.rows), "source": "repeat", "same_as": first}
        self.rows.append({**self.rows[first], **again})

    def done(self, ended: str | None = None) -> Mapping[str, Any]:
        """End the study, and return its result."""
        limits = [limit_text(limit) for limit in self.limits]
        with Broker(Space(self.SPACE), self.objectives, self.asked, constraints=limits) as broker:
            names = Row.__dataclass_fields__
            broker.restore([Row(**{name: row[name] for name in names}) for row in self.rows])
            best = broker.best() if len(self.objectives) == 1 else None
            result = {
                "trials": self.rows,
                "baseline": {name: one.to_dict() for name, one in self.base.items()},
                "best": None if best is None else best.number,
                "front": [row.number for row in broker.front()],
                "importances": importances(broker.rows(), broker.space, broker.objectives),
                "ended": ended,
            }
        self.lab.outcomes[self.name] = result
        return result

    def _bound(self, limit: Mapping[str, Any]) -> float | None:
        return self.base[limit["metric"]].value if limit["of_baseline"] else None

    def _measured(
        self, trial: str, loss: float, speed: float, kv: float, apply: Any, **more: Any
    ) -> dict[str, Measured]:
        """Add the jobs of a trial; return what those that are done report."""
        why, jobs = more.pop("fails", None), []
        for seed in self.seeds:
            of, job = f"base[seed={seed}]", f"{self.name}/{trial}"
            fails = (Cause.USER_ERROR, why) if why and seed == self.seeds[-1] else None
            one = (loss + 0.01 * seed, f"{job}/evaluate", {"noise": 0.01, "outcome": fails})
            two = (speed + seed, f"{job}/benchmark", {"kv": kv, **more})
            for make, (number, kind, beside) in (
                (self.lab.evaluate, one),
                (self.lab.benchmark, two),
            ):
                old = make(of, number, job=kind, apply=apply, **beside)
                self.lab.rename(old, f"{kind}[seed={seed}]")
                result, row = self.lab.outcomes[f"{kind}[seed={seed}]"], self.lab.jobs[-1]
                if isinstance(result, dict):
                    jobs.append(Done(row.kind, seed, row.spec, result))
        metrics = (*self.objectives, *(limit["metric"] for limit in self.limits))
        return measured(jobs, dict.fromkeys(metrics))

    def compared(self) -> Comparison:
        return compare(self.lab.load(self.lab.save({})))

    def printed(self, width: int = 160) -> str:
        """What a terminal shows."""
        out = io.StringIO()
        draw(self.compared(), Console(file=out, width=width, color_system=None))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def page(self) -> str:
        """The report."""
        with Store.open(f"sqlite:///{self.lab.home / 'kvlab.db'}") as store:
            text = report_of(store, self.lab.save({}))
        assert text is not None
        return text


@pytest.fixture
def search(lab: Any) -> partial[Search]:
    """Makes a study over two seeds of a model; say its objectives."""
    for seed in (0, 1):
        lab.train("base", seed)
    return partial(Search, lab)


@pytest.fixture
def mixed(search: Any) -> Search:
    """Three objectives and a constraint; an infeasible, a failed, a void and a repeated trial."""
    objectives = {"perplexity": "minimize", "tokens_per_second": "maximize"}
    objectives["kv_bytes_per_token"] = "minimize"
    study: Search = search(objectives, [("perplexity", "<=", 1.1, True)], baseline=True, asked=10)
    study.trial(0.1, 0.2, 3.52, 120, 3000.0)
    study.trial(0.2, 0.2, 3.9, 200, 2000.0)
    study.trial(0.3, 0.3, 3.55, 150, 2500.0, "bfloat16")
    study.trial(0.4, 0.3, 3.6, 110, 2600.0, fails="no memory\nin detail")
    study.trial(0.5, 0.4, 3.53, 110, 2800.0, gates={"alone": False})
    study.repeat(0)
    study.trial(0.6, 0.4, 3.58, 100, 3900.0)
    study.done("all 6 feasible points are known: 4 of 10 trials are left")
    return study
