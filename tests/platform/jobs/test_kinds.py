"""Kinds of job: ours, and those that another installed package brings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.platform.jobs import IMPLICIT, KINDS, OURS

OUTSIDE = """
from kvlab.platform.jobs.kind import Kind, Settings

class GreetSettings(Settings):
    name: str

class Greet(Kind):
    name = "greet"
    settings = GreetSettings

    def resolve(self, settings, around):
        return {"name": settings.name, "seed": around.seed}

    def sources(self, spec):
        return ("outside",)
"""


@pytest.mark.parametrize("name", OURS)
def test_our_kinds(name: str) -> None:
    kind = KINDS[name]
    assert kind.name == name
    assert KINDS[name] is kind
    assert set(kind.reference_paths) <= set(kind.references)
    assert kind.settings.model_json_schema()["additionalProperties"] is False


def test_only_the_implicit_kind_is_not_written() -> None:
    assert IMPLICIT in KINDS
    assert "nothing" not in KINDS


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell where a package with a kind of its own is installed."""
    (tmp_path / "outside.py").write_text(OUTSIDE)
    about = tmp_path / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[kvlab.kinds]\ngreet = outside:Greet\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_a_kind_from_outside_is_read_planned_and_in_the_schema(
    outside: dict[str, str], tmp_path: Path
) -> None:
    workflow = tmp_path / "w.yaml"
    workflow.write_text("version: 1\nname: w\njobs:\n  hello: {greet: {name: you}}\n")

    def kvlab(*arguments: str) -> str:
        code = "from kvlab.platform.cli.main import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        env = {**outside, "KVLAB_HOME": str(tmp_path / "home")}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert kvlab("validate", str(workflow)).endswith("valid: 1 jobs (hello 1)\n")
    assert "hello  greet" in kvlab("plan", str(workflow))
    assert '"kind_greet"' in kvlab("schema")
