"""The Optuna study behind a broker: it proposes points and is told what became of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.platform.search.rows import Direction, Row, State
from kvlab.platform.search.samplers import build
from kvlab.platform.search.space import Space, Values

if TYPE_CHECKING:
    from optuna import Trial

MOST_LISTED = 100_000
"""Points of a space that is listed when its sampler finds nothing new in it."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A point that a trial of the Optuna study stands for."""

    values: Values
    key: str
    trial: Trial


class Proposals:
    """One sampler over one space. Not thread-safe: a single thread asks and tells.

    Args:
        space: whose `feasible` every proposal meets, but those of `fixed`.
        objectives: directions by name.
        seed: of the sampler. The same seed, asks and tells give the same points.
        past: rows of an earlier life of the study, by number; a sampler that has drawn before
            starts from another seed, or it would draw the same points again.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, Direction],
        sampler: str,
        seed: int,
        past: Sequence[Row] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space
        self.objectives = dict(objectives)
        self._random = random.Random(seed + len(past))
        self.study = optuna.create_study(
            directions=list(self.objectives.values()),
            sampler=build(sampler, space, objectives=len(self.objectives), seed=seed + len(past)),
        )
        for row in past:
            if row.state != "running":
                self._recall(row)

    def ask(self) -> Proposal:
        """Let the sampler propose a point, feasible or not, known or not."""
        return self._proposed(self.study.ask())

    def fixed(self, values: Values) -> Proposal:
        """Return a proposal of this very point; the sampler draws what it lacks."""
        import optuna

        self.study.enqueue_trial(self.space.encode(values, partial=True)[0])
        trial = self.study.ask()
        if isinstance(self.study.sampler, optuna.samplers.BaseGASampler):
            # Reading them is what counts a trial into its generation; a fixed one never does.
            _ = trial.relative_params
        return self._proposed(trial)

    def unknown(self, known: Mapping[str, object]) -> Iterator[Values]:
        """Yield the feasible points of a finite space whose keys are not known, in random order."""
        points = list(self.space.points())
        self._random.shuffle(points)
        for values in points:
            if self.space.key(values) not in known and self.space.feasible(values) is None:
                yield values

    def tell(
        self,
        trial: Trial,
        state: State,
        objectives: Mapping[str, float],
        constraints: Mapping[str, float],
    ) -> None:
        """End a trial."""
        if state == "complete":
            for name, excess in constraints.items():
                trial.set_constraint(name, excess)
        self.study.tell(trial, **self._outcome(state, objectives))

    def refuse(self, proposal: Proposal) -> None:
        """End a trial that will not be run."""
        self.tell(proposal.trial, "failed", {}, {})

    def _proposed(self, trial: Trial) -> Proposal:
        values = self.space.suggest(trial)
        return Proposal(values, self.space.key(values), trial)

    def _outcome(self, state: State, objectives: Mapping[str, float]) -> dict[str, Any]:
        from optuna.trial import TrialState

        if state == "complete":
            return {"values": [objectives[name] for name in self.objectives]}
        return {"state": TrialState.PRUNED if state == "pruned" else TrialState.FAIL}

    def _recall(self, row: Row) -> None:
        """Add an ended trial as if it had been asked for and told here."""
        import optuna
        from optuna.trial import TrialState, create_trial

        try:
            params, distributions = self.space.encode(dict(row.values))
        except KvlabError as error:
            raise KvlabError(f"{error} (trial {row.number} of this study)") from error
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=distributions,
                constraints=dict(row.constraints) if row.state == "complete" else None,
            )
        )
        trial = self.study.get_trials(deepcopy=False)[-1]
        if isinstance(self.study.sampler, optuna.samplers.BaseGASampler):
            self.study.sampler.get_trial_generation(self.study, trial)
        self.study.tell(trial.number, **self._outcome(row.state, row.objectives))
