"""Who is stopped, by hand; and what an unpruned study says that stopping would have done."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from kvlab import KvlabError
from kvlab.platform.search.pruners import PRUNERS, SINGLE, build
from kvlab.platform.search.pruning import Curve, DominancePruner, Pruner, dominated
from kvlab.platform.search.quality import non_dominated
from kvlab.platform.search.rows import Direction
from kvlab.platform.search.rows import losses as in_order

TWO: dict[str, Direction] = {"loss": "minimize", "speed": "maximize"}
ONE: dict[str, Direction] = {"loss": "minimize"}


def curve(steps: Sequence[int], loss: Sequence[float], speed: Sequence[float] = ()) -> Curve:
    told = [{"loss": value} for value in loss]
    for values, value in zip(told, speed, strict=False):
        values["speed"] = value
    return list(zip(steps, told, strict=True))


@dataclass(frozen=True, slots=True)
class Saving:
    """What a pruner would have done to a study that ran without it.

    Attributes:
        steps: saved, out of `all_steps`.
        stopped: numbers of the trials stopped, rising.
        lost: those of them that stand on the front of the whole study (of one objective: are best).
        kept: the rest of that front.
    """

    steps: int
    all_steps: int
    stopped: tuple[int, ...]
    lost: tuple[int, ...]
    kept: tuple[int, ...]


def replay(
    curves: Mapping[int, Curve],
    pruner: Pruner,
    objectives: Mapping[str, Direction],
    *,
    parallel: int = 1,
) -> Saving:
    """Run the complete curves of an unpruned study through a pruner.

    Args:
        curves: by number; the last point of each has every objective.
        parallel: trials at a time, each one report a turn, started by number.
    """
    waiting = sorted(curves)
    at = dict.fromkeys(waiting[:parallel], 0)
    del waiting[:parallel]
    saved: dict[int, int] = {}
    while at:
        for number in list(at):
            curve = curves[number]
            step, values = curve[at[number]]
            at[number] += 1
            stop = pruner.report(number, step, values)
            ended = at[number] == len(curve)
            if ended:
                pruner.finished(number)
            elif stop:
                saved[number] = curve[-1][0] - step
                pruner.stopped(number)
            if ended or stop:
                del at[number]
                if waiting:
                    at[waiting.pop(0)] = 0
    numbers = sorted(curves)
    ends = [in_order(curves[number][-1][1], objectives) for number in numbers]
    front = [numbers[index] for index in non_dominated(ends)]
    return Saving(
        steps=sum(saved.values()),
        all_steps=sum(curve[-1][0] for curve in curves.values()),
        stopped=tuple(sorted(saved)),
        lost=tuple(number for number in front if number in saved),
        kept=tuple(number for number in front if number not in saved),
    )


FINISHED = curve([10, 20, 30], [3.0, 2.0, 1.0], [50.0, 50.0, 50.0])


@pytest.mark.parametrize(
    ("running", "margin", "expected"),
    [
        # Worse on both at 20.
        (curve([10, 20], [4.0, 3.0], [40.0, 40.0]), 0.0, True),
        # Slower, but a better loss: nobody dominates it.
        (curve([10, 20], [4.0, 1.9], [40.0, 40.0]), 0.0, False),
        # Worse by 5 % on loss: not beyond a margin of 10 %.
        (curve([20], [2.1], [40.0]), 0.0, True),
        (curve([20], [2.1], [40.0]), 0.1, False),
        # Equal speed neither saves nor condemns; equal on both is no dominance.
        (curve([20], [3.0], [50.0]), 0.1, True),
        (curve([20], [2.0], [50.0]), 0.0, False),
        # Step 25 is not in the other curve: compared at 20, where it was still better.
        (curve([20, 25], [1.9, 9.0], [40.0, 1.0]), 0.0, False),
        # No common step at all.
        (curve([5, 15], [9.0, 9.0], [1.0, 1.0]), 0.0, False),
        # Only loss so far: compared by loss alone.
        (curve([20], [3.0]), 0.0, True),
        # Speed known from the first report on saves it at step 20.
        ([(10, {"loss": 9.0, "speed": 60.0}), (20, {"loss": 9.0})], 0.0, False),
        ([], 0.0, False),
    ],
)
def test_dominance_by_hand(running: Curve, margin: float, expected: bool) -> None:
    assert dominated(running, FINISHED, TWO, margin) is expected


def test_what_a_finished_trial_never_measured_is_no_measure() -> None:
    assert not dominated(curve([20], [9.0], [1.0]), curve([20, 30], [1.0, 1.0]), TWO, 0.0)


def feed(pruner: DominancePruner, number: int, told: Curve) -> list[bool]:
    return [pruner.report(number, step, values) for step, values in told]


GOOD = curve([10, 20, 30], [1.0, 1.0, 1.0], [50.0, 50.0, 50.0])
BAD = curve([10, 20, 30], [9.0, 9.0, 9.0], [5.0, 5.0, 5.0])


def test_nobody_is_stopped_before_enough_have_finished() -> None:
    pruner = DominancePruner(TWO, startup=2, grace=0.0)
    for number in (0, 1):
        assert not any(feed(pruner, number, GOOD))
        assert feed(pruner, 10 + number, BAD) == [False] * 3
        pruner.finished(number)
    assert feed(pruner, 20, BAD) == [True] * 3


def test_nobody_is_stopped_in_its_grace() -> None:
    pruner = DominancePruner(TWO, startup=1, grace=0.5)
    feed(pruner, 0, GOOD)
    pruner.finished(0)
    assert feed(pruner, 1, BAD) == [False, True, True]


def test_as_many_as_asked_for_must_dominate() -> None:
    pruner = DominancePruner(TWO, startup=1, grace=0.0, by=2)
    feed(pruner, 0, GOOD)
    pruner.finished(0)
    assert feed(pruner, 1, BAD) == [False] * 3
    feed(pruner, 2, GOOD)
    pruner.finished(2)
    assert feed(pruner, 3, BAD) == [True] * 3


def test_a_stopped_trial_judges_nobody() -> None:
    pruner = DominancePruner(TWO, startup=1, grace=0.0)
    feed(pruner, 0, GOOD)
    pruner.stopped(0)
    assert feed(pruner, 1, BAD) == [False] * 3
    pruner.finished(7)  # it never reported


def test_a_replay_by_hand() -> None:
    curves = {0: GOOD, 1: BAD, 2: curve([10, 20, 30], [0.5, 0.5, 0.5], [50.0, 50.0, 50.0])}
    found = replay(curves, DominancePruner(TWO, startup=1, grace=0.0), TWO)
    assert (found.stopped, found.steps, found.all_steps) == ((1,), 20, 90)
    assert (found.kept, found.lost) == ((2,), ())
    # Two at a time: the bad one has nobody to be measured by until it ends.
    found = replay(curves, DominancePruner(TWO, startup=1, grace=0.0), TWO, parallel=2)
    assert (found.stopped, found.steps) == ((), 0)


def test_a_replay_says_when_it_costs_the_best() -> None:
    late = curve([10, 20, 30], [9.0, 9.0, 0.1], [5.0, 5.0, 99.0])
    found = replay({0: GOOD, 1: late}, DominancePruner(TWO, startup=1, grace=0.0), TWO)
    assert found.lost == (1,)
    assert found.kept == ()


def losses(number: int, *, steps: int = 27, sign: float = 1.0) -> dict[int, Curve]:
    draw = random.Random(2)
    return {
        each: curve(
            range(1, steps + 1),
            [sign * (level + 2 ** (-step / 6)) for step in range(1, steps + 1)],
        )
        for each, level in enumerate(draw.sample([n / number for n in range(number)], number))
    }


@pytest.mark.parametrize("name", [*SINGLE[:4], "auto", "dominance"])
def test_pruners_of_one_objective_save_steps_in_both_directions(name: str) -> None:
    up: dict[str, Direction] = {"loss": "maximize"}
    found = replay(losses(30), build(name, ONE), ONE, parallel=3)
    assert 0.2 < found.steps / found.all_steps < 0.95
    assert len(found.stopped) < 30
    assert found == replay(losses(30), build(name, ONE), ONE, parallel=3)
    assert replay(losses(30, sign=-1.0), build(name, up), up, parallel=3) == found
    if name in ("median", "auto", "dominance"):  # curves that never cross: the best is never lost
        assert found.lost == ()


def test_auto_is_the_median_of_one_and_dominance_of_several() -> None:
    curves = losses(30)
    assert replay(curves, build("auto", ONE), ONE) == replay(curves, build("median", ONE), ONE)
    assert isinstance(build("auto", TWO), DominancePruner)


def test_wilcoxon_stops_what_is_worse_on_the_same_prompts() -> None:
    draw = random.Random(0)
    hard = [draw.random() * 10 for _ in range(40)]  # prompts differ more than trials do
    pruner = build("wilcoxon", ONE)
    stops: dict[int, int | None] = {}
    for number, level in enumerate((0.0, 1.0, -0.5)):
        stops[number] = None
        for prompt, loss in enumerate(hard):
            told = {"loss": loss + level + draw.gauss(0, 0.3)}
            if pruner.report(number, prompt, told):
                stops[number] = prompt
                pruner.stopped(number)
                break
        else:
            pruner.finished(number)
    assert stops[0] is None
    assert stops[1] is not None
    assert stops[1] < 15
    assert stops[2] is None


def test_wilcoxon_measures_by_the_best_mean_and_not_by_the_last_prompt() -> None:
    pruner = build("wilcoxon", ONE)
    # The first is better on all prompts but the last.
    for number, (level, last) in enumerate([(0.0, 9.0), (3.0, 0.0)]):
        for prompt in range(12):
            pruner.report(number, prompt, {"loss": level + prompt if prompt < 11 else last})
        pruner.finished(number)
    assert any(pruner.report(2, prompt, {"loss": 1.0 + prompt}) for prompt in range(11))


def test_a_stopped_trial_does_not_count_as_finished_for_optuna() -> None:
    pruner = build("median", ONE)
    for number in range(5):
        assert not pruner.report(number, 1, {"loss": 1.0})
        if number < 4:
            pruner.finished(number)
        else:
            pruner.stopped(number)
    assert not pruner.report(8, 1, {"loss": 9.0})
    pruner.report(5, 1, {"loss": 1.0})
    pruner.finished(5)
    assert pruner.report(9, 1, {"loss": 9.0})


def test_a_report_without_the_objective_changes_nothing() -> None:
    pruner = build("median", ONE)
    assert not pruner.report(0, 1, {"accuracy": 0.5})
    pruner.finished(0)
    pruner.stopped(0)


@pytest.mark.parametrize(
    ("name", "objectives", "says"),
    [
        ("medain", ONE, f"pruner: unknown 'medain': known: {', '.join(PRUNERS)}"),
        ("median", TWO, "pruner: median knows one objective, found 2: choose dominance or auto"),
        ("wilcoxon", TWO, "pruner: wilcoxon knows one objective"),
    ],
)
def test_what_a_pruner_cannot_is_refused(
    name: str, objectives: dict[str, Direction], says: str
) -> None:
    with pytest.raises(KvlabError) as caught:
        build(name, objectives)
    assert str(caught.value).startswith(says)
