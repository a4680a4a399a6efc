"""Every sampler searches what it can, and refuses the rest before anything runs."""

from __future__ import annotations

import warnings

import pytest

from kvlab import KvlabError
from kvlab.platform.search import samplers
from kvlab.platform.search.proposals import Proposals
from kvlab.platform.search.rows import Direction, Row
from kvlab.platform.search.samplers import SAMPLERS, check
from kvlab.platform.search.space import Dimension, Space

METHOD = Dimension("method", "categorical", choices=("a", "b"))
P = Dimension("p", "float", 0.1, 0.9, step=0.1, when=("method", frozenset({0})))
STEPS = Dimension("m", "int", 1, 8)
FLOAT = Dimension("x", "float", 0.0, 1.0)
CONDITIONAL = Space([METHOD, P, STEPS])
NUMBERS = Space([STEPS, FLOAT])
ONE: dict[str, Direction] = {"loss": "minimize"}
TWO: dict[str, Direction] = {"loss": "minimize", "speed": "maximize"}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "cma-es"])
@pytest.mark.parametrize("objectives", [ONE, TWO], ids=["one", "two"])
def test_it_proposes_in_the_space_whatever_became_of_the_last(
    name: str, objectives: dict[str, Direction]
) -> None:
    space = CONDITIONAL if name in ("tpe", "nsga2", "random", "grid") else NUMBERS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proposals = Proposals(space, objectives, name, seed=3)
        for number in range(16):
            proposal = proposals.ask()
            assert space.admit(proposal.values) == proposal.values
            told = {"loss": float(proposal.values["m"]), "speed": 1.0}
            state = {3: "failed", 5: "pruned"}.get(number, "complete")
            proposals.tell(proposal.trial, state, told, {"c": 0.5 - number})  # type: ignore[arg-type]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "find_spec", lambda name: None if name == "cmaes" else object())
    with pytest.raises(KvlabError, match=r"^sampler: cma-es needs cmaes: pip install cmaes$"):
        check("cma-es", NUMBERS, 1)


def test_cma_es_closes_in_on_the_best() -> None:
    proposals = Proposals(NUMBERS, ONE, "cma-es", seed=3)
    seen = []
    for _ in range(80):
        proposal = proposals.ask()
        seen.append((proposal.values["x"] - 0.7) ** 2)
        proposals.tell(proposal.trial, "complete", {"loss": seen[-1]}, {})
    assert sum(seen[-20:]) < 0.2 * sum(seen[:20])


@pytest.mark.parametrize(
    ("name", "space", "objectives", "says"),
    [
        ("tpr", NUMBERS, 1, "sampler: unknown 'tpr': did you mean 'tpe'? known: tpe, nsga2, gp"),
        ("grid", NUMBERS, 1, "sampler: a grid needs a step for x: give step, or a list"),
        ("gp", CONDITIONAL, 1, "sampler: gp cannot search p, which some points lack"),
        ("qmc", CONDITIONAL, 2, "sampler: qmc cannot search p, which some points lack"),
        ("cma-es", CONDITIONAL, 1, "sampler: cma-es cannot search p, which some points lack"),
        ("cma-es", Space([METHOD, FLOAT]), 1, "sampler: cma-es cannot search method, which is no"),
        ("cma-es", Space([FLOAT]), 1, "sampler: cma-es needs two dimensions or more"),
        ("nsga2", Space([METHOD, P]), 2, "sampler: nsga2 breeds what all points have, and of one"),
        ("nsga2", Space([FLOAT]), 1, "sampler: nsga2 breeds what all points have, and of one"),
        ("cma-es", NUMBERS, 2, "sampler: cma-es has one objective, found 2"),
    ],
)
def test_what_it_cannot_search_is_refused(
    name: str, space: Space, objectives: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "find_spec", lambda package: object())
    with pytest.raises(KvlabError) as caught:
        check(name, space, objectives)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("gp", "torch"), ("qmc", "scipy"), ("tpe", "optuna")]
)
def test_what_is_not_installed_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "find_spec", lambda found: None if found == package else 1)
    with pytest.raises(KvlabError, match=rf"{name} needs {package}: pip install {package}$"):
        check(name, NUMBERS, 1)


def test_a_fixed_point_counts_into_its_generation() -> None:
    """NSGA-II breeds from the trials that have one; Optuna leaves those enqueued without."""
    proposals = Proposals(NUMBERS, TWO, "nsga2", seed=0)
    proposal = proposals.fixed({"m": 2, "x": 0.5})
    assert proposal.values == {"m": 2, "x": 0.5}
    proposals.tell(proposal.trial, "complete", {"loss": 1.0, "speed": 1.0}, {})
    sampler = proposals.study.sampler
    assert len(sampler.get_population(proposals.study, 0)) == 1  # type: ignore[attr-defined]


def test_restored_trials_keep_their_generation_and_their_constraints() -> None:
    told = [Row(n, {"m": n + 1, "x": 0.5}, "complete", {"loss": 1.0}, {"c": -n}) for n in range(4)]
    proposals = Proposals(NUMBERS, ONE, "nsga2", 0, [*told, Row(4, {"m": 8, "x": 0.5}, "failed")])
    sampler = proposals.study.sampler
    assert len(sampler.get_population(proposals.study, 0)) == 4  # type: ignore[attr-defined]
    assert [trial.constraints for trial in proposals.study.trials] == [
        *({"c": -n} for n in range(4)),
        {},
    ]


def test_tpe_learns() -> None:
    """The second half of a study lies nearer to the best than a random one's."""

    def mean(name: str) -> float:
        proposals = Proposals(Space([FLOAT, STEPS]), ONE, name, seed=1)
        losses = []
        for _ in range(40):
            proposal = proposals.ask()
            losses.append((proposal.values["x"] - 0.3) ** 2 + 0.1 * abs(proposal.values["m"] - 6))
            proposals.tell(proposal.trial, "complete", {"loss": losses[-1]}, {})
        return sum(losses[20:]) / 20

    assert mean("tpe") < 0.6 * mean("random")
