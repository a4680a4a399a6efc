"""A study's table on a terminal and in the report."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from kvlab.platform.compare.study_sheet import MOST, MOST_FRONT

GOLDEN = Path(__file__).parents[1] / "golden" / "study.txt"
ONE = {"perplexity": "minimize"}
TWO = {"perplexity": "minimize", "kv_bytes_per_token": "minimize"}


def shown(text: str) -> list[int]:
    """The trials that have a row, in order."""
    return [int(n) for n in re.findall(r"^ (?:◆|  )\s?trial (\d+) ", text, re.MULTILINE)]


def in_report(page: str) -> list[int]:
    return [int(n) for n in re.findall(r">(?:◆ )?trial (\d+)</div>", page)]


def test_a_study_reads_as_it_should(mixed: Any) -> None:
    assert mixed.printed(140) + "\n" == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(mixed: Any, width: int) -> None:
    assert max(len(line) for line in mixed.printed(width).splitlines()) <= width


def test_the_ten_best_of_one_objective_lead(search: Any) -> None:
    study = search(ONE, asked=14)
    for number in range(14):
        study.trial(0.1 + 0.05 * number, 0.2, 3.5 + 0.1 * abs(number - 7))
    result = study.done()
    value = {t["number"]: t["objectives"]["perplexity"] for t in result["trials"]}
    text = study.printed()
    assert shown(text) == sorted(value, key=lambda n: value[n])[:MOST]
    assert text.count("◆ trial") == 1
    assert f"◆ trial {result['best']}" in text
    assert "4 more are in report.html and the JSON." in text
    assert "Trial 7 was chosen by its own perplexity out of 14" in text
    assert "of 14 trials, trial 7 has the lowest perplexity" in text
    assert in_report(study.page()) == list(range(14))


def test_a_long_front_is_cut_on_a_terminal_alone(search: Any) -> None:
    count = MOST_FRONT + 3
    study = search(TWO, asked=count + 1)
    for number in range(count):
        study.trial(0.1 + 0.02 * number, 0.2, 3.5 + 0.02 * number, kv=4000.0 - number)
    study.trial(0.85, 0.2, 4.5, kv=5000.0)
    study.done()
    text = study.printed()
    assert shown(text) == list(range(MOST_FRONT))
    assert "3 more on the front are in report.html and the JSON." in text
    assert f"of {count + 1} trials, {count} are on the front" in text
    assert in_report(study.page()) == list(range(count + 1))


def test_where_none_is_feasible_those_that_miss_least_are_shown(search: Any) -> None:
    limits = [("kv_bytes_per_token", "<=", 3000, False), ("tokens_per_second", ">=", 2000, False)]
    study = search(ONE, limits)
    study.trial(0.1, 0.2, 3.6, 150, kv=3500.0)
    study.trial(0.2, 0.2, 3.4, 100, kv=3500.0)
    study.trial(0.3, 0.2, 3.5, 100, kv=2000.0)
    study.done()
    text = study.printed()
    assert shown(text) == [2, 0, 1]
    assert text.count("misses kv_bytes_per_token <= 3000") == 2
    assert text.count("misses tokens_per_second >= 2000") == 2
    assert "No trial meets the constraints: those shown miss the fewest." in text
    said = "kv_bytes_per_token <= 3000 and tokens_per_second >= 2000"
    assert f"best: none of 3 trials meets {said}." in text
    assert "◆" not in text


def test_a_void_winner_is_compared_with_nothing(search: Any) -> None:
    study = search({"tokens_per_second": "maximize"}, baseline=True)
    study.trial(0.1, 0.2, 3.5, 200, gates={"alone": False})
    study.trial(0.2, 0.2, 3.5, 150)
    study.done()
    text = study.printed()
    reason = "the machine was not idle"
    assert f"Trial 0, the best, is void ({reason}): compared with nothing." in text
    assert "Trial 0 against" not in text
    assert f"trial 0 has the highest tokens/s, 3,208 (void: {reason})" in text


def test_one_seed_has_the_interval_of_its_repeats(search: Any) -> None:
    study = search({"tokens_per_second": "maximize"}, baseline=True, seeds=(0,))
    study.trial(0.1, 0.2, 3.5, 150)
    study.done()
    text = study.printed()
    assert "Trial 0 against base: tokens/s ×1.50 [1.44,\N{NO-BREAK SPACE}1.57]." in text
    assert "one seed; below a number the 95 % interval of its repeats" in text


def test_what_is_counted_flatters_nobody(search: Any) -> None:
    study = search({"kv_bytes_per_token": "minimize"})
    study.trial(0.1, 0.2, 3.5, kv=2000.0)
    study.trial(0.2, 0.2, 3.5, kv=3000.0)
    study.done()
    text = study.printed()
    assert "trial 0 has the lowest KV per token, 2,000 B (counted)" in text
    assert "was chosen" not in text


def test_a_ratio_that_is_not_known_says_so(search: Any) -> None:
    study = search(ONE, baseline=True)
    study.trial(0.1, 0.2, 3.5001)
    study.done()
    found = re.search(
        r"Trial 0 against base: perplexity ×1\.00 \[(.*),\s(.*)\], not", study.printed()
    )
    assert found is not None
    assert float(found[1]) <= 1 <= float(found[2])


def test_importances_are_lines_largest_first(search: Any) -> None:
    study = search(ONE, asked=24)
    for number in range(24):
        study.trial(0.1 + 0.03 * number, 0.2 + 0.01 * (number % 5), 3.5 + 0.05 * number)
    shares = study.done()["importances"]["perplexity"]
    found = re.search(r"Importance for perplexity: (.*)\.", study.printed())
    assert found is not None
    said = [part.split(" ") for part in found[1].split(", ")]
    assert [name for name, _ in said] == [path.split(".")[1] for path in shares]
    assert [float(share) for _, share in said] == pytest.approx(list(shares.values()), abs=0.005)
    assert [share for _, share in said] == sorted((s for _, s in said), reverse=True)
    assert said[0][0] == "p"


def test_the_report_has_every_trial_and_every_remark(mixed: Any) -> None:
    page = unescape(mixed.page())
    assert in_report(page) == [0, 1, 2, 3, 4, 5, 6]
    for part in (
        "repeats trial 0, not run",
        "misses perplexity <= 1.1 * baseline",
        ">failed</div>",
        f"beyond by {mixed.rows[1]['constraints']['perplexity <= 1.1 * baseline']:.4g}",
        "best/3/evaluate[seed=1]: no memory",
        "1 trial failed: trial 3",
        "1 point was proposed again, and answered without running.",
        "It ended early: all 6 feasible points are known: 4 of 10 trials are left.",
    ):
        assert part in page
    assert "more are in report.html" not in page


def test_trials_of_fewer_seeds_say_so(search: Any) -> None:
    study = search(ONE)
    study.trial(0.1, 0.2, 3.5, fails="no memory")
    study.trial(0.2, 0.2, 3.5)
    study.done()
    assert "1 of 2 seeds" in study.page()
