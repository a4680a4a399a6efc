"""What is asked for, as a command line says it: what stands, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvlab import KvlabError
from kvlab.platform.trying.asked import (
    NAME,
    Asked,
    budgets_of,
    check_budgets,
    lengths,
    memory_of,
    methods_of,
)
from kvlab.platform.trying.subject import Subject, read

Write = Callable[..., Path]


@pytest.fixture
def subject(checkpoint: Write) -> Subject:
    return read(checkpoint(), "tiny")


def test_budgets_are_shares_in_order_each_once() -> None:
    assert budgets_of("50%,10 %, 12.5%,10%") == (0.1, 0.125, 0.5)
    assert budgets_of("100%") == (1.0,)


@pytest.mark.parametrize(
    "text", ["0%", "101%", "", "10", "ten%", "-5%", "10%,,20%", "1e1%", "nan%"]
)
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(KvlabError, match=r"^--budget: must be "):
        budgets_of(text)


def test_memory_and_methods() -> None:
    assert memory_of("24GiB") == 24 << 30
    assert memory_of("1000") == 1000
    assert memory_of(None) is None
    assert methods_of("h2o, int8,h2o") == ("h2o", "int8")
    with pytest.raises(KvlabError, match="--memory: must be bytes such as"):
        memory_of("much")
    with pytest.raises(KvlabError, match="--methods: unknown 'h20': did you mean 'h2o'"):
        methods_of("h20")
    with pytest.raises(KvlabError, match="--methods: unknown 'full_attention'"):
        methods_of("full_attention")


def test_lengths_are_what_fits(subject: Subject) -> None:
    assert lengths(subject, None, None, False, None) == (192, 64)
    assert lengths(subject, None, None, True, None) == (224, 32)
    assert lengths(subject, 100, 20, False, None) == (100, 20)
    assert lengths(subject, None, 16, False, 90) == (74, 16)


@pytest.mark.parametrize(
    ("prompt", "after", "held", "said"),
    [
        (250, 10, None, "more than the model's 256 positions: give 246 or fewer"),
        (100, 16, 90, "its text has 90 tokens, one prompt and what follows it take 116"),
        (8, 16, None, "must be at least 16 tokens, found 8"),
        (None, 16, 20, "must be at least 16 tokens, found 4"),
    ],
)
def test_lengths_that_cannot_be(
    subject: Subject, prompt: int | None, after: int, held: int | None, said: str
) -> None:
    with pytest.raises(KvlabError, match=said):
        lengths(subject, prompt, after, False, held)


def test_a_budget_without_room_for_sinks() -> None:
    check_budgets((0.05, 0.1), 100, 1)
    with pytest.raises(
        KvlabError, match=r"4 % of a prompt of 100 tokens is 4 of 100 rows.* give 5 %"
    ):
        check_budgets((0.04, 0.1), 100, 1)


def test_one_question_has_one_name_and_another_has_another(subject: Subject) -> None:
    one = Asked((0.1,), "cpu", 64, 16, 4, 4, 0)
    assert one.name(subject) == Asked((0.1,), "cpu", 64, 16, 4, 4, 0).name(subject)
    assert one.name(subject) != Asked((0.2,), "cpu", 64, 16, 4, 4, 0).name(subject)
    assert NAME.fullmatch(one.name(subject))
