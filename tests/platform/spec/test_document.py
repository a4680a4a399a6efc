"""YAML text becomes plain values whose lines are known."""

from __future__ import annotations

import pytest

from kvlab.platform.spec.document import LARGEST_FILE, parse
from kvlab.platform.spec.problems import WorkflowError


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1), ("-7", -7), ("0", 0), ("010", "010"), ("1_000", "1_000"), ("0x10", "0x10"),
        ("1.5", 1.5), ("3e-3", 0.003), ("2e6", 2e6), (".5", 0.5), ("1.", 1.0), ("400k", "400k"),
        ("true", True), ("False", False), ("yes", "yes"), ("on", "on"), ("null", None),
        ("~", None), ("", None), ("2026-11-21", "2026-11-21"), ("'1'", "1"), ('"true"', "true"),
        ("[1, [a]]", [1, ["a"]]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("!a", None),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(written: str, value: object) -> None:
    if written == "!a":
        with pytest.raises(WorkflowError, match="must not use tags"):
            parse(f"x: {written}")
        return
    found = parse(f"x: {written}").value["x"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_text_whatever_they_look_like() -> None:
    assert parse("1: a\ntrue: b\nnull: c").value == {"1": "a", "true": "b", "null": "c"}


def test_every_path_has_its_line() -> None:
    document = parse("# head\na:\n  - x\n  - b:\n      c: 1\nd: {e: 1,\n  f: 2}\n", "file")
    assert document.line(("a",)) == 2
    assert document.line(("a", 0)) == 3
    assert document.line(("a", 1, "b", "c")) == 5
    assert document.line(("d", "e")) == 6
    assert document.line(("d", "f")) == 7
    assert document.line(("d", "not there")) == 6
    assert str(document.problem(("a", 1, "b"), "is wrong")) == "file:4: a[1].b: is wrong"


@pytest.mark.parametrize("breaks", ["\n", "\r\n", "\r"])
def test_lines_are_an_editors_lines(breaks: str) -> None:
    text = breaks.join(["a: '\x85\u2028'", "b: 2", "b: 3"])
    with pytest.raises(WorkflowError, match=r"^workflow:3: b: is written twice, first on line 2$"):
        parse(text)


def test_all_refused_values_are_told_at_once() -> None:
    with pytest.raises(WorkflowError) as error:
        parse("a: .inf\nb: 1e999\nc: 99999999999999999999\na: 1\n")
    assert [problem.line for problem in error.value.problems] == [1, 2, 3, 4]


def test_no_line_of_a_message_breaks() -> None:
    with pytest.raises(WorkflowError) as error:
        parse('"a\\nb\\e[31m": 1\n"a\\nb\\e[31m": 2\n')
    assert str(error.value) == "workflow:2: a\\nb\\x1b[31m: is written twice, first on line 1"


def test_a_megabyte_is_read_and_more_is_not() -> None:
    line = "a{}: [1, 2, {{b: c}}]\n"
    text = "".join(line.format(n) for n in range(40_000))
    assert 800_000 < len(text) < LARGEST_FILE
    assert len(parse(text).value) == 40_000
    with pytest.raises(WorkflowError, match=f"is larger than {LARGEST_FILE}"):
        parse("#" * (LARGEST_FILE + 1))
