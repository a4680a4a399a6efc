"""What the cache's page shows runs, and every value and parameter of the two axes is on it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import kvlab
from kvlab.methods.axis import Value
from kvlab.methods.registry import REGISTRY, resolve

PAGE = Path(kvlab.__file__).parents[2] / "docs" / "cache.md"


def shown(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_shown_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = shown("python")
    exec(compile(code, str(PAGE), "exec"), {})
    held, predicted = map(int, capsys.readouterr().out.split())
    assert held == pytest.approx(predicted, rel=0.02)


def test_shown_methods_are_ones() -> None:
    (workflow,) = shown("yaml")
    written = yaml.safe_load(workflow)["jobs"]["quality"]["matrix"]["evaluate.apply"]
    assert [len(resolve(each).to_dict()) for each in written] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "value", [*REGISTRY.values("eviction"), *REGISTRY.values("budget")], ids=lambda v: v.name
)
def test_every_parameter_is_on_the_page(value: Value) -> None:
    row = next(
        line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{value.name}`")
    )
    amount = {"share", "tokens"} if "and `" in row else set()
    missing = {f.name for f in fields(value.params) if f"`{f.name}`" not in row} - amount
    assert not missing
