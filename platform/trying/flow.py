"""A try from the question to the answer: screen, compose, measure, say what was best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvlab import KvlabError
from kvlab.db.states import WorkflowState
from kvlab.platform.trying import choose
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.figures import Findings
from kvlab.platform.trying.plan import QUALITY, Plan
from kvlab.platform.trying.points import Candidates, Point, by_budget
from kvlab.platform.trying.run import Ran, Runner
from kvlab.platform.trying.sheet import Sheet, Sheets
from kvlab.platform.trying.subject import Subject

FULL = Point({}, None)


class NoAnswer(KvlabError):
    """What every point is compared with could not be had: a job failed, not the question."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """How a try ended.

    Attributes:
        text: the YAML of everything that ran. workflow: its number.
        state: how its last stage ended. mirror: what MLflow lacks, or None.
    """

    sheet: Sheet
    text: str
    workflow: int
    state: WorkflowState
    mirror: str | None


class Try:
    """One question about one model.

    Attributes:
        points: all that were thought of so far, as they stand in the table.
    """

    def __init__(
        self,
        subject: Subject,
        asked: Asked,
        data: Mapping[str, Any],
        candidates: Candidates,
        memory: int,
        cpus: int,
    ) -> None:
        self._subject, self._asked, self._candidates = subject, asked, candidates
        self._plan = Plan(subject, asked, data)
        self._sheets = Sheets(subject, asked, candidates, memory)
        self._cpus = cpus
        self.singles = candidates.singles()
        self.points: list[Point] = [FULL, *self.singles]

    def sheet(self, findings: Findings) -> Sheet:
        """The table of what is known."""
        return self._sheets.make(self.points, findings, self._candidates.left_out)

    def text(self) -> str:
        return self._plan.text(self._cpus)

    def forecast(self) -> Plan:
        """What would run if the first evictions were the best: for the predicted time."""
        stand_in = {
            budget: [p.eviction for p in members if p.eviction][: choose.BEST_EVICTIONS]
            for budget, members in by_budget(self.singles).items()
        }
        composed = [] if self._asked.quick else self._candidates.composed(stand_in)
        most = choose.QUICK_DETAILED if self._asked.quick else choose.DETAILED
        points = [*self.points, *composed]
        detailed = [point for point in points if point.budget is None]
        for members in by_budget(points).values():
            detailed += members[:most]
        recalled = _once(detailed) if self._asked.pairs else []
        return replace(self._plan, quality=_once(points), recall=recalled, speed=_once(detailed))

    def run(self, runner: Runner, written: Callable[[str], None]) -> Answer:
        """Run the stages.

        Args:
            written: is told the YAML of every stage before it runs.

        Raises:
            NoAnswer: the full cache could not be scored. KvlabError: a stage cannot be run.
        """
        findings = Findings()
        ran: Ran | None = None
        for stage in (self._screen, self._compose, self._measure):
            if not stage(findings):
                continue
            written(self.text())
            ran = runner.stage(self.text())
            findings.read(ran.workflow.jobs)
            if ran.state in (WorkflowState.STOPPED, WorkflowState.CANCELLED):
                break
            if FULL.key not in findings.divergence:
                before = next(iter(findings.problems.values()), "unknown")
                why = findings.failed.get((QUALITY, FULL.key), before)
                raise NoAnswer(f"the full cache could not be scored: {why}")
        assert ran is not None
        return Answer(self.sheet(findings), self.text(), ran.workflow.row.id, ran.state, ran.mirror)

    def _screen(self, findings: Findings) -> bool:
        asked = [FULL] if self._asked.pairs else []
        self._plan = replace(self._plan, quality=_once(self.points), recall=asked)
        return True

    def _compose(self, findings: Findings) -> bool:
        if self._asked.quick:
            return False
        best = choose.best_evictions(self.sheet(findings).rows)
        composed = self._candidates.composed(best)
        self.points += composed
        self._plan = replace(self._plan, quality=_once(self.points))
        return bool(composed)

    def _measure(self, findings: Findings) -> bool:
        chosen = choose.worth_it(self.sheet(findings).rows, self._asked.quick)
        # Where the full cache answers too few questions, they say nothing about any other.
        reference = findings.recall.get(FULL.key)
        asked = _once(chosen) if reference is not None and not reference.void else self._plan.recall
        self._plan = replace(self._plan, recall=asked, speed=_once(chosen))
        return bool(chosen)


def _once(points: list[Point]) -> list[Point]:
    """Each way of using the model once: at 100 % two names may stand for one."""
    return list({point.key: point for point in reversed(points)}.values())[::-1]
