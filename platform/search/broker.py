"""One study's points: proposed ahead of time, handed out at once, told when they end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from kvlab import KvlabError
from kvlab.platform.search.proposals import MOST_LISTED, Proposal, Proposals
from kvlab.platform.search.quality import non_dominated
from kvlab.platform.search.rows import Direction, Point, Row, Source, State, accepted, losses
from kvlab.platform.search.samplers import check
from kvlab.platform.search.space import Space, Values

if TYPE_CHECKING:
    from optuna import Study

MOST_INFEASIBLE = 100
MOST_REPEATS = 10
"""Proposals for one point that are infeasible, or known, before the broker looks for itself."""

Ended = Literal["complete", "failed", "pruned"]


class Broker:
    """Hands out the points of one study to any number of threads. In memory alone.

    A thread of its own asks the sampler, so that neither `ask` nor `tell` waits for it as long as
    points were asked ahead. Where nothing is asked ahead and one caller asks and tells in turn, the
    same seed gives the same points.

    No point is handed out twice. One that is proposed again gets a row that repeats the first one's
    result as soon as there is one, and does not count among the trials; if that one failed, no row.

    Args:
        objectives: directions by name, in order.
        trials: how many points are handed out, those restored included.
        sampler: a name of `samplers.SAMPLERS`.
        ahead: how many points wait to be handed out. Each was proposed without what was told since.
        constraints: names that every complete trial reports; 0 or less is feasible.

    Raises:
        KvlabError: a sampler that is unknown or cannot search this space.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, Direction],
        trials: int,
        *,
        sampler: str = "tpe",
        seed: int = 0,
        ahead: int = 0,
        constraints: Sequence[str] = (),
    ) -> None:
        check(sampler, space, len(objectives))
        self.space = space
        self.objectives = dict(objectives)
        self.trials = trials
        self._constraints = tuple(constraints)
        self._points = space.count()
        self._sampler, self._seed, self._ahead = sampler, seed, ahead
        self._changed = threading.Condition()
        self._proposals: Proposals | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: Exception | None = None
        self._rows: dict[int, Row] = {}
        self._keys: dict[str, int | None] = {}
        """Of every point proposed: its trial's number, None until it is handed out."""
        self._numbers = count()
        self._given = 0
        """Trials handed out, or about to be again."""
        self._enqueued: deque[Values] = deque()
        self._again: deque[int] = deque()
        self._ready: deque[tuple[Proposal, Source]] = deque()
        self._asking = 0
        self._running: dict[int, Proposal] = {}
        self._told: deque[tuple[Proposal, Row]] = deque()
        self._waiting: dict[str, list[Proposal]] = {}
        """By key: proposals that repeat a point whose result is not there yet."""
        self._repeats: deque[Row] = deque()
        self._ended = ""

    # Before the first point.

    def restore(self, rows: Sequence[Row]) -> None:
        """Take up a study whose controller was killed: before the first `ask`.

        Trials that were running keep their numbers and are handed out again, before all others.

        Raises:
            KvlabError: the study has begun, a number stands twice, or a point is not in the space.
        """
        with self._changed:
            if self._proposals is not None or self._rows:
                raise KvlabError("a study is restored before its first point is asked for")
            ordered = sorted(rows, key=lambda row: row.number)
            self._rows = {row.number: row for row in ordered}
            if len(self._rows) < len(ordered):
                raise KvlabError("a trial's number stands twice in the rows to restore")
            self._numbers = count(max(self._rows, default=-1) + 1)
            self._given = sum(row.source != "repeat" for row in ordered)
            self._start(ordered)
            for row in ordered:
                if row.state == "running":
                    self._running[row.number] = self._study_side().fixed(dict(row.values))
                    self._again.append(row.number)
                if row.source != "repeat":
                    self._keys[self.space.key(row.values)] = row.number

    def enqueue(self, values: Mapping[str, Any], *, partial: bool = False) -> bool:
        """Have a point handed out before those of the sampler; False: it is known already.

        Args: partial: the sampler draws what is not given.

        Raises:
            KvlabError: it is not in the space, or not feasible.
        """
        point = self.space.admit(values, partial=partial)
        if not partial and (problem := self.space.feasible(point)):
            raise KvlabError(f"{problem}, in the point {point}")
        with self._changed:
            known = [*(row.values for row in self._rows.values()), *self._enqueued]
            known += [proposal.values for proposal, _ in self._ready]
            if any(point.items() <= other.items() for other in known):
                return False
            self._enqueued.append(point)
            self._changed.notify_all()
        return True

    # While it runs.

    def ask(self) -> Point | None:
        """Return a point to be run; None: there is none any more, `ended` says why.

        Raises:
            KvlabError: the sampler finds no feasible point.
        """
        self.start()
        with self._changed:
            self._asking += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._again or self._ready or self._over())
            finally:
                self._asking -= 1
            if self._again and not self._closed:
                number = self._again.popleft()
                return Point(number, dict(self._rows[number].values))
            if self._ready and not self._closed:
                proposal, source = self._ready.popleft()
                row = Row(next(self._numbers), proposal.values, source=source)
                self._rows[row.number] = row
                self._keys[proposal.key] = row.number
                self._running[row.number] = proposal
                self._given += 1
                self._changed.notify_all()
                return Point(row.number, dict(row.values))
            if self._error is not None:
                raise self._error
            return None

    def start(self) -> None:
        """Have points proposed ahead of the first `ask`."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._start(())
                self._thread = threading.Thread(target=self._work, name="search", daemon=True)
                self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether `ask` would answer at once."""
        with self._changed:
            return bool(self._again or self._ready) or self._over()

    @property
    def over(self) -> bool:
        """Whether nobody will get another point, and `ask` has no error to raise either."""
        with self._changed:
            return not (self._again or self._ready or self._error) and self._over()

    def tell(
        self,
        number: int,
        objectives: Mapping[str, float] | None = None,
        constraints: Mapping[str, float] | None = None,
        state: Ended = "complete",
    ) -> bool:
        """End a trial; a complete one with a number that is NaN or infinite has failed.

        Returns:
            False where it had ended before: nothing changed.

        Raises:
            KvlabError: a trial that was never handed out, an objective or a constraint that lacks.
        """
        with self._changed:
            row = self._rows.get(number)
            if row is None:
                raise KvlabError(f"trial {number} was never handed out")
            if row.state != "running":
                return False
            found = None
            if state == "complete":
                found = accepted(objectives, constraints, list(self.objectives), self._constraints)
            numbers = found or ({}, {})
            ended: State = "failed" if state == "complete" and found is None else state
            row = replace(row, state=ended, objectives=numbers[0], constraints=numbers[1])
            if number in self._again:
                self._again.remove(number)
            self._rows[number] = row
            self._told.append((self._running.pop(number), row))
            for proposal in self._waiting.pop(self.space.key(row.values), ()):
                self._repeat(proposal, row)
            self._changed.notify_all()
        return True

    def repeats(self) -> list[Row]:
        """Return the rows answered from earlier trials since the last call."""
        with self._changed:
            found = list(self._repeats)
            self._repeats.clear()
        return found

    def rows(self) -> list[Row]:
        """Return every row, by number: handed out, ended and repeated."""
        with self._changed:
            return [self._rows[number] for number in sorted(self._rows)]

    def row(self, number: int) -> Row:
        """Return a trial as it stands."""
        with self._changed:
            return self._rows[number]

    @property
    def ended(self) -> str:
        """Why the study ends before all its trials were handed out; empty: it does not."""
        return self._ended

    @property
    def study(self) -> Study:
        """Optuna's study, for a mirror to read: a little behind the rows until `close`.

        Its trials have numbers of their own, and include those that were refused.
        """
        with self._changed:
            self._start(())
            return self._study_side().study

    def close(self) -> None:
        """Hand out nothing more; returns when the thread has ended: after a proposal at most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What was found.

    def best(self, objective: str | None = None) -> Row | None:
        """Return the best feasible trial by an objective, the first one by default."""
        name = objective or next(iter(self.objectives))
        only = {name: self.objectives[name]}
        return min(self._feasible(), key=lambda row: losses(row.objectives, only), default=None)

    def front(self) -> list[Row]:
        """Return the feasible trials that no other dominates, by number."""
        rows = self._feasible()
        points = [losses(row.objectives, self.objectives) for row in rows]
        return [rows[index] for index in non_dominated(points)]

    def _feasible(self) -> list[Row]:
        return [row for row in self.rows() if row.feasible and row.source != "repeat"]

    # The thread that owns the study.

    def _start(self, past: Sequence[Row]) -> None:
        if self._proposals is None:
            self._proposals = Proposals(
                self.space, self.objectives, self._sampler, self._seed, past
            )

    def _study_side(self) -> Proposals:
        assert self._proposals is not None
        return self._proposals

    def _over(self) -> bool:
        """Whether nobody will get another point."""
        return self._closed or bool(self._error or self._ended) or self._left() <= 0

    def _left(self) -> int:
        """Trials that nobody has been given, and no point waits for."""
        return self.trials - self._given - len(self._ready)

    def _wanted(self) -> bool:
        over = self._ended or self._error or self._left() <= 0
        return not over and len(self._ready) < max(self._ahead, self._asking - len(self._again))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._told or self._wanted())
                told = list(self._told)
                self._told.clear()
                wanted = self._wanted() and not self._closed
                if self._closed and not told:
                    return
            try:
                for proposal, row in told:
                    self._study_side().tell(
                        proposal.trial, row.state, row.objectives, row.constraints
                    )
                if wanted:
                    self._propose()
            except Exception as error:
                # Whoever asks raises it: a thread's own traceback would reach nobody.
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

    def _propose(self) -> None:
        """Put one new point where `ask` finds it, or say why there is none."""
        proposals = self._study_side()
        with self._changed:
            given = self._enqueued.popleft() if self._enqueued else None
        if given is not None:
            proposal = proposals.fixed(given)
            if self.space.feasible(proposal.values) is None:
                self._offer(proposal, "enqueued")
            else:
                proposals.refuse(proposal)
            return
        infeasible = repeats = 0
        problem = ""
        exhausted = len(self._keys) == self._points
        while infeasible < MOST_INFEASIBLE and repeats < MOST_REPEATS and not exhausted:
            proposal = proposals.ask()
            reason = self.space.feasible(proposal.values)
            if reason is not None:
                infeasible, problem = infeasible + 1, reason
                proposals.refuse(proposal)
            elif self._offer(proposal, "sampler"):
                return
            else:
                repeats += 1
        listed = self._points is not None and self._points <= MOST_LISTED
        values = next(proposals.unknown(self._keys), None) if listed else None
        if values is not None:
            self._offer(proposals.fixed(values), "sampler")
            return
        if not self._keys or (infeasible == MOST_INFEASIBLE and not listed):
            raise KvlabError(f"no feasible point in {infeasible} tries; of the last one: {problem}")
        with self._changed:
            every = "all" if listed else "the sampler proposes nothing beside"
            self._ended = (
                f"{every} {len(self._keys)} feasible points are known: {self._left()} of "
                f"{self.trials} trials are left"
            )
            self._changed.notify_all()

    def _offer(self, proposal: Proposal, source: Source) -> bool:
        """Queue a proposal; False: the point is known, and its trial is or will be answered."""
        with self._changed:
            if proposal.key not in self._keys:
                self._keys[proposal.key] = None
                self._ready.append((proposal, source))
                self._changed.notify_all()
                return True
            number = self._keys[proposal.key]
            first = None if number is None else self._rows[number]
            if first is None or first.state == "running":
                self._waiting.setdefault(proposal.key, []).append(proposal)
            else:
                self._repeat(proposal, first)
            return False

    def _repeat(self, proposal: Proposal, first: Row) -> None:
        if first.state == "failed":
            self._told.append((proposal, first))
            return
        row = replace(first, number=next(self._numbers), source="repeat", same_as=first.number)
        self._rows[row.number] = row
        self._repeats.append(row)
        self._told.append((proposal, row))
