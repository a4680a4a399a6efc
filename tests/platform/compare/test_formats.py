"""Numbers as text."""

from __future__ import annotations

import pytest

from kvlab.platform.compare.formats import value_text
from kvlab.platform.compare.metrics import METRICS


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("kl", 0.0, "0"),
        ("kl", 1.656e-15, "1.66e-15"),
        ("kl", 0.000331, "0.000331"),
        ("kl", 0.0408, "0.0408"),
        ("kl", 0.9721, "0.972"),
        ("kl", 1.449, "1.45"),
        ("perplexity", 33.414, "33.41"),
        ("top1_agreement", 0.1251, "12.5 %"),
    ],
)
def test_three_or_four_digits_that_say_something(name: str, value: float, text: str) -> None:
    assert value_text(METRICS[name], value) == text
