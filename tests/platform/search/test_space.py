"""A space: what exists under which choices, what is one point, and how a YAML says it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import optuna
import pytest

from kvlab import KvlabError
from kvlab.platform.search.ranges import declared, parse, searchable
from kvlab.platform.search.space import Dimension, Space

METHOD = Dimension("method", "categorical", choices=({"squeeze_attention": {}}, {"h2o": {}}, "x"))
P = Dimension("p", "float", 0.1, 0.9, step=0.1, when=("method", frozenset({0})))
RECENT = Dimension("recent", "float", 0.0, 1.0, step=0.5, when=("method", frozenset({1, 2})))
BITS = Dimension("bits", "categorical", choices=(2, 4))
SPACE = Space([METHOD, P, RECENT, BITS])


def refused(action: Any, *arguments: Any) -> str:
    with pytest.raises(KvlabError) as caught:
        action(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def sampled(space: Space, number: int) -> list[dict[str, Any]]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(number):
        trial = study.ask()
        found.append(space.suggest(trial))
        study.tell(trial, 0.0)
    return found


def test_only_what_the_choices_call_for_is_asked() -> None:
    points = sampled(SPACE, 60)
    for values in points:
        assert ("p" in values) == (values["method"] == {"squeeze_attention": {}})
        assert ("recent" in values) != ("p" in values)
        assert values["bits"] in (2, 4)
    assert len({SPACE.key(values) for values in points}) > 10


def test_a_condition_on_a_dimension_that_is_not_there_does_not_hold() -> None:
    chain = Space(
        [
            Dimension("a", "categorical", choices=("yes", "no")),
            Dimension("b", "categorical", choices=(1, 2), when=("a", frozenset({0}))),
            Dimension("c", "int", 0, 3, when=("b", frozenset({1}))),
        ]
    )
    assert chain.count() == 1 + (1 + 4)
    points = list(chain.points())
    assert len(points) == 6
    assert {"a": "no"} in points
    assert {"a": "yes", "b": 1} in points
    assert chain.admit({"a": "no", "b": 2, "c": 1}) == {"a": "no"}


def test_the_points_are_as_many_as_counted_and_all_different() -> None:
    points = list(SPACE.points())
    assert SPACE.count() == (9 + 3 + 3) * 2 == len(points)
    assert len({SPACE.key(values) for values in points}) == len(points)
    assert {SPACE.key(values) for values in sampled(SPACE, 500)} == {*map(SPACE.key, points)}


def test_a_continuum_has_no_count_and_no_grid() -> None:
    space = Space([Dimension("a", "float", 0.0, 1.0), BITS])
    assert space.count() is None
    assert "a: a float without a step has no grid" in refused(list, space.points())
    # Where the float does not exist, it does not count.
    rare = Dimension("a", "float", 0.0, 1.0, when=("bits", frozenset({0})))
    assert Space([BITS, rare]).count() is None
    assert Space([Dimension("a", "float", 0.5, 0.5)]).count() == 1


def test_one_point_has_one_key() -> None:
    one = {"method": "x", "recent": 0.5, "bits": 2}
    same = {"bits": 2, "p": 0.3, "recent": 0.5, "method": "x"}
    assert SPACE.key(one) == SPACE.key(same)
    squeezed = {"method": {"squeeze_attention": {}}, "bits": 4}
    assert SPACE.key({**squeezed, "p": 0.1 + 0.2}) == SPACE.key({**squeezed, "p": 0.3})
    assert SPACE.key({**squeezed, "p": 0.4}) != SPACE.key({**squeezed, "p": 0.3})
    nested = Space([Dimension("a", "categorical", choices=({"x": 1, "y": 2}, {"x": 2, "y": 1}))])
    assert nested.key({"a": {"y": 2, "x": 1}}) == nested.key({"a": {"x": 1, "y": 2}})
    whole = Space([Dimension("a", "float", 0, 2)])
    assert whole.key({"a": 1}) == whole.key({"a": 1.0})


def test_true_is_not_one() -> None:
    space = Space([Dimension("a", "categorical", choices=(True, 1, "1", None))])
    points = sampled(space, 50)
    assert {repr(values["a"]) for values in points} == {"True", "1", "'1'", "None"}
    assert len({space.key(values) for values in points}) == 4


def test_log_with_a_step_gives_multiples_and_says_so_to_optuna() -> None:
    group = declared("kivi", "group")
    space = Space([group])
    found = {values["kivi.group"] for values in sampled(space, 300)}
    assert all(value % 8 == 0 and 8 <= value <= 1024 for value in found)
    assert {8, 16} <= found
    assert space.count() == 128 == len(list(space.points()))
    params, distributions = space.encode({"kivi.group": 64})
    assert params == {"kivi.group/8": 8}
    assert distributions["kivi.group/8"].log


@pytest.mark.parametrize("values", list(SPACE.points())[::7])
def test_what_optuna_stores_comes_back(values: dict[str, Any]) -> None:
    study = optuna.create_study()
    params, distributions = SPACE.encode(values)
    assert set(params) == set(distributions)
    study.enqueue_trial(params)
    assert SPACE.suggest(study.ask()) == values


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "y", "bits": 2}, "method: must be one of"),
        ({"method": "x", "recent": 0.3, "bits": 2}, "recent: must be float from 0 to 1 in steps"),
        ({"method": "x", "recent": 1.5, "bits": 2}, "recent: must be float from 0 to 1"),
        ({"method": "x", "recent": 0.5}, "bits: has no value"),
        ({"method": "x", "recent": 0.5, "bits": True}, "bits: must be one of 2, 4, found True"),
        ({"methd": "x"}, "methd: is not in the space; it has: method, p, recent, bits"),
    ],
)
def test_a_point_outside_is_refused(values: dict[str, Any], says: str) -> None:
    assert refused(SPACE.admit, values).startswith(says)


def dimension(*arguments: Any, **named: Any) -> Any:
    return lambda: Dimension("a", *arguments, **named)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (dimension("float", 1, 0), "a: a range goes from low to high, found 1 to 0"),
        (dimension("float", 0, 1, log=True), "a: a log range must start above 0"),
        (dimension("float", 0, float("inf")), "a: both ends of a range must be finite"),
        (dimension("float", 0, 1, step=0.3), "a: 0 to 1 is not a whole number of steps of 0.3"),
        (dimension("int", 0, 9, step=0), "a: step must be above 0"),
        (dimension("float", 1, 2, step=1, log=True), "a: a float has a step or a log scale"),
        (dimension("int", 8, 20, step=8, log=True), "a: with log, both ends must be multiples"),
        (dimension("categorical"), "a: needs at least one choice"),
        (dimension("categorical", choices=(1, 2, 1)), "a: each choice may stand once, found 1"),
        (dimension("categorical", choices=({1},)), "a: choices must be what JSON can say"),
        (lambda: Space([BITS, BITS]), "bits: stands twice"),
        (lambda: Space([P, METHOD]), "p: depends on 'method', which is no categorical dimension"),
        (
            lambda: Space([BITS, Dimension("c", "int", 0, 1, when=("bits", frozenset({2})))]),
            "c: 'bits' has choices 0 to 1, found [2]",
        ),
    ],
)
def test_an_impossible_space_is_refused(make: Any, says: str) -> None:
    assert refused(make).startswith(says)


def test_methods_declare_their_dimensions() -> None:
    p = declared("squeeze_attention", "p")
    assert p == Dimension("squeeze_attention.p", "float", 0.01, 1.0)
    length = declared("block_transformer", "block_length")
    assert (length.kind, length.low, length.high, length.log) == ("int", 1, 64, True)
    assert declared("squeeze_attention", "importance").choices == ("cosine", "mass")
    assert declared("streaming_llm", "turns").choices == (False, True)
    assert declared("prefill", "early_exit").choices == (False, True)
    assert searchable("fp8") == ("scale",)


def test_what_is_not_declared_is_refused_with_what_is() -> None:
    text = refused(declared, "h2o", "recents")
    assert text == (
        "h2o.recents: 'h2o' declares no range of that name; it has: recent, positions, generated"
    )
    assert "controller" not in searchable("adore")  # a folder: text without options
    assert "did you mean 'h2o'" in refused(declared, "h20", "recent")


ALLOWED = declared("squeeze_attention", "p")
GROUP = declared("kivi", "group")
SINKS = declared("streaming_llm", "sinks")
RULE = declared("pyramidkv", "rule")


@pytest.mark.parametrize(
    ("given", "allowed", "expected"),
    [
        (None, ALLOWED, ALLOWED),
        ({"float": [0.1, 0.9]}, ALLOWED, Dimension("a", "float", 0.1, 0.9)),
        ({"float": [0.1, 0.9, "log"]}, ALLOWED, Dimension("a", "float", 0.1, 0.9, log=True)),
        ({"float": [0.1, 0.9], "step": 0.1}, ALLOWED, Dimension("a", "float", 0.1, 0.9, 0.1)),
        ({"float": [1, 2]}, None, Dimension("a", "float", 1, 2)),
        ({"int": [32, 256, "log"]}, SINKS, Dimension("a", "int", 32, 256, log=True)),
        ({"int": [2, 8, 2]}, SINKS, Dimension("a", "int", 2, 8, 2)),
        ({"int": [32, 256, "log"]}, GROUP, Dimension("a", "int", 32, 256, 8, log=True)),
        ([0.2, 0.4, None], ALLOWED, Dimension("a", "categorical", choices=(0.2, 0.4, None))),
        (["paper", "kvpress"], RULE, Dimension("a", "categorical", choices=("paper", "kvpress"))),
        ([{"h2o": {}}], None, Dimension("a", "categorical", choices=({"h2o": {}},))),
    ],
)
def test_a_yaml_says_a_dimension(
    given: Any, allowed: Dimension | None, expected: Dimension
) -> None:
    found = parse("a", given, allowed)
    assert found == Dimension(
        "a",
        expected.kind,
        expected.low,
        expected.high,
        expected.step,
        expected.log,
        expected.choices,
    )


@pytest.mark.parametrize(
    ("given", "allowed", "says"),
    [
        (None, None, "a: declares no range: give a list of values, {float"),
        (0.5, ALLOWED, "a: must be a list of values, {float"),
        ({"float": [0.1, 1.5]}, ALLOWED, "a: must lie within 0.01 to 1, found 0.1 to 1.5"),
        ({"float": [0.001, 0.5]}, ALLOWED, "a: must lie within 0.01 to 1, found 0.001 to 0.5"),
        ({"float": [0.9, 0.1]}, ALLOWED, "a: a range goes from low to high, found 0.9 to 0.1"),
        ({"float": [0.1]}, ALLOWED, "a: float must be [low, high]"),
        ({"float": [0.1, "0.9"]}, ALLOWED, "a: float must be made of numbers, found '0.9'"),
        ({"float": [0.1, True]}, ALLOWED, "a: float must be made of numbers, found True"),
        ({"float": [0.1, 0.9, 0.1], "step": 0.1}, ALLOWED, "a: the step is given twice"),
        ({"flaot": [0.1, 0.9]}, ALLOWED, "a: must be a list of values, {float"),
        ({"float": [0, 1], "int": [0, 1]}, ALLOWED, "a: must be a list of values, {float"),
        ({"float": [0.1, 0.9, "lin"]}, ALLOWED, "a: float must be made of numbers, found 'lin'"),
        ({"int": [0.5, 4]}, SINKS, "a: int must be made of whole numbers, found 0.5"),
        ({"float": [1, 4]}, SINKS, "a: is a whole number: must be {int: [low, high]}"),
        ({"int": [12, 60, 8]}, GROUP, "a: goes from 8 in steps of 8, found from 12"),
        ({"int": [8, 64, 4]}, GROUP, "a: goes from 8 in steps of 8, found from 8 in steps of 4"),
        ({"int": [0, 1]}, RULE, "a: must be a list out of 'conserve', 'paper', 'kvpress'"),
        ([0.2, 2.0], ALLOWED, "a: must be float from 0.01 to 1, found 2.0"),
        (["papers"], RULE, 'a: must be one of "conserve", "paper", "kvpress", found \'papers\''),
        ([], RULE, "a: needs at least one choice"),
    ],
)
def test_a_wrong_dimension_is_one_line(given: Any, allowed: Dimension | None, says: str) -> None:
    assert refused(parse, "a", given, allowed).startswith(says)


def test_reading_a_space_imports_no_optuna() -> None:
    code = (
        "import sys; from kvlab.platform.search import ranges, samplers, space; "
        "space.Space([ranges.declared('h2o', 'recent')]).count(); "
        "print(sorted({'optuna', 'torch', 'ray', 'pydantic', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
