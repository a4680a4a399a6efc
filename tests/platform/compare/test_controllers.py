"""Label and controller jobs in a comparison: the arms they decide, the table and the sentences."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from kvlab.platform.compare.build import compare
from kvlab.platform.compare.table import draw

ADORE = {"eviction": {"adore": {"rebuild": 8}}}
RIVALS = {
    "h2o": {"recall": {"16": 0.3, "32": 0.4}, "precision": 0.3},
    "recency": {"recall": {"16": 0.25, "32": 0.35}, "precision": 0.25},
}


def controller(lab: Any, name: str, recall: float) -> str:
    result = {
        "parameters": 1234,
        "recall": {"16": recall, "32": recall + 0.1},
        "precision": recall,
        "rivals": RIVALS,
    }
    parents = {"of": "base[seed=0]", "labels": "labels[seed=0]"}
    return str(lab.add(f"{name}[seed=0]", name, "controller", {}, {"seed": 0}, parents, result))


@pytest.fixture
def study(lab: Any) -> Any:
    base = lab.train("base", 0)
    result = {"rivals": RIVALS, "covered": 0.9}
    parents = {"of": base, "data": "data"}
    lab.add("labels[seed=0]", "labels", "label", {"top": 16}, {"seed": 0}, parents, result)
    good, bad = controller(lab, "good", 0.8), controller(lab, "bad", 0.28)
    lab.evaluate(base, 3.5, noise=0.01)
    for number, source in enumerate((good, bad)):
        lab.evaluate(base, 3.6 + number, job=f"quality{number}", apply=ADORE, noise=0.01)
        lab.jobs[-1].parents["controller"] = source
    return lab


def test_arms_say_which_controller_they_were_given(study: Any) -> None:
    names = [arm.id for arm in compare(study.load(study.save())).arms]
    assert names[0] == "base"
    assert set(names[1:]) == {f"base + adore with controller {name}" for name in ("good", "bad")}


def test_the_table_and_the_sentence(study: Any) -> None:
    comparison = compare(study.load(study.save()))
    out = io.StringIO()
    draw(comparison, Console(file=out, width=200, color_system=None))
    text = out.getvalue()
    assert "labels[seed=0]: the 16 most attended tokens" in text
    for part in ("80.0 %", "90.0 %", "28.0 %", "attention received so far", "1,234"):
        assert part in text
    assert "Controller bad[seed=0] finds no more of the labelled tokens than attention" in text
    assert "Controller good" not in text
    found = json.loads(json.dumps(comparison.to_json()))["guesses"]
    assert [guess["id"] for guess in found][:2] == ["good[seed=0]", "bad[seed=0]"]
