"""Whatever is written, reading ends in problems with a line each, or in a graph."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvlab.platform.graph import Graph
from kvlab.platform.spec.document import parse
from kvlab.platform.spec.problems import WorkflowError
from kvlab.platform.spec.read import check

QUICKSTART = Path(__file__).parents[3] / "workflows" / "quickstart.yaml"
VALID = parse(QUICKSTART.read_text()).value
VALID["jobs"]["tuned"] = {
    "needs": ["base"],
    "resources": {"cpus": 1, "memory": "1GiB", "workers": 2},
    "retries": {"node_lost": 1},
    "timeout": "20m",
    "uptrain": {
        "from": {"job": "base", "where": {"seed": 0}},
        "method": "full_attention",
        "tokens": "1M",
        "lora": {"rank": 4, "targets": ["q"]},
        "distill": {"from": "base", "weight": 0.5},
    },
}
VALID["jobs"]["windows"] = {
    "matrix": {"evaluate.apply": ["full_attention", {"sliding_window": {"window": 16}}]},
    "evaluate": {"of": "base"},
}

WORDS = st.sampled_from(
    ["base", "block", "seed", "full_attention", "block_transformer", "sliding_window", "data",
     "train", "uptrain", "matrix", "train.tokens", "resources.cpus", "uptrain.from", "400k", "2e6",
     "512MiB", "20m", "python", "", "..", "a/b", "<<", "~", "nano"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    WORDS,
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.one_of(
        st.lists(below, max_size=4), st.dictionaries(WORDS | st.text(max_size=6), below, max_size=4)
    ),
    max_leaves=8,
)
MORE = int(os.environ.get("KVLAB_FUZZ", "0"))
"""Tries of every test beyond the suite's own few, which are the same in every run."""


def tried(times: int) -> settings:
    """Hypothesis settings: so many examples, and KVLAB_FUZZ random ones instead where it is set."""
    return settings(
        max_examples=MORE or times,
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def outcome(text: str) -> Graph | WorkflowError:
    """Read, and hold the promise about what reading ends in."""
    try:
        graph = check(text)
    except WorkflowError as error:
        hold(error, text)
        return error
    names = [cell.name for cell in graph.cells]
    assert len(set(names)) == len(names)
    before: set[str] = set()
    for cell in graph.cells:
        assert before.issuperset(cell.parents.values())
        assert before.issuperset(cell.needs)
        json.dumps(cell.spec, allow_nan=False)
        before.add(cell.name)
    return graph


def hold(error: WorkflowError, text: str) -> None:
    """Every problem is one line of the message, and names a line of the text."""
    lines = len(re.split("\r\n|\r|\n", text))
    assert error.problems
    for line, problem in zip(str(error).splitlines(), error.problems, strict=True):
        assert line == str(problem)
        assert 1 <= problem.line <= lines
        assert problem.message


@tried(300)
@given(st.text(alphabet=st.characters(), max_size=300))
@example("a: \ud800")
@example("\ufeffversion: 1")
@example("a: !!python/object/apply:os.system [echo]")
@example("? {a: 1}\n: 2")
@example("a: '\x85'\nb: \u2028\n: 3")
def test_any_text(text: str) -> None:
    outcome(text)


@tried(200)
@given(st.text(alphabet="abc:-[]{}&*!|>'\"%@`#, \n\t?.01e~<", max_size=80))
def test_text_made_of_yaml_marks(text: str) -> None:
    outcome(text)


@tried(150)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with pytest.raises(WorkflowError):
        check(path)


@tried(400)
@given(st.data())
def test_mutated_workflows(data: st.DataObject) -> None:
    value = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data, value)
    outcome(json.dumps(value))


def mutate(data: st.DataObject, value: object) -> None:
    """Replace, remove, rename or add one thing somewhere below `value`."""
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        below = holder[key]
        if isinstance(below, dict | list) and data.draw(st.integers(0, 4)):
            holder = below
            continue
        action = data.draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if action == "replace":
            holder[key] = data.draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, data.draw(VALUES))
        elif action == "rename":
            holder[data.draw(WORDS | st.text(max_size=8))] = holder.pop(key)
        else:
            holder[data.draw(WORDS | st.text(max_size=8))] = data.draw(VALUES)
        return
