"""An identity changes with what decides a result, and with nothing else."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kvlab.platform.graph import Cell
from kvlab.platform.spec import identity, machine
from kvlab.platform.spec.identity import changed, code_digest, explain, identify
from kvlab.platform.spec.read import load_graph


def identities(text: str) -> dict[str, str]:
    return {cell.name: cell.identity for cell in load_graph(text).cells}


def jobs_of(cells: dict[str, str]) -> set[str]:
    return {name.split("[")[0] for name in cells}


def differing(before: str, after: str) -> set[str]:
    """Jobs whose identities are not the same in two workflows with the same cells."""
    old, new = identities(before), identities(after)
    assert old.keys() == new.keys()
    return jobs_of({name: "" for name in old if old[name] != new[name]})


def test_reading_twice_gives_the_same_identities_all_distinct(good: str) -> None:
    first = identities(good)
    assert identities(good) == first
    assert len(set(first.values())) == len(first) == 28


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ("name: quickstart", "name: another", set()),
        ("pareto: [perplexity, ", "pareto: [", set()),
        ("version: 1", "# a remark\nversion: 1", set()),
        ("tokens: 400k", "tokens: 400000", set()),
        ("tokens: 400k", "tokens: 400k, checkpoint_every: 5", set()),
        ("tokens: 400k", "tokens: 400k, log_every: 5", set()),
        ("    train:", "    retries: 0\n    timeout: 1h\n    train:", set()),
        ("repeats: 5", "repeats: 6", {"speed"}),
        ("metrics: [perplexity, ", "metrics: [", {"quality"}),
        ("tokens: 100k", "tokens: 101k", {"block", "quality", "speed"}),
        ("tokens: 400k", "tokens: 401k", {"base", "block", "quality", "speed"}),
        ("bpe: 2048", "bpe: 2047", {"data", "base", "block", "quality", "speed"}),
        ("preset: nano", "preset: nano, rope_theta: 500000", {"base", "block", "quality", "speed"}),
    ],
)
def test_only_what_depends_on_a_change_is_stale(
    good: str, old: str, new: str, stale: set[str]
) -> None:
    assert old in good
    assert differing(good, good.replace(old, new)) == stale


def test_data_counts_by_content_not_by_place(good: str, tmp_path: Path) -> None:
    here, there = tmp_path / "a.txt", tmp_path / "elsewhere" / "b.txt"
    there.parent.mkdir()
    here.write_text("some text\n" * 100)
    shutil.copy(here, there)
    first = good.replace("source: python", f"source: {{text: {here}}}")
    second = good.replace("source: python", f"source: {{text: {there}}}")
    assert differing(first, second) == set()
    there.write_text("other text\n" * 100)
    assert "data" in differing(first, second)


def test_how_a_file_is_read_counts(good: str, tmp_path: Path) -> None:
    plain, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text('{"text": "some text"}\n' * 100)
    shutil.copy(plain, records)
    first, second = (
        good.replace("source: python", f"source: {{text: {path}}}") for path in (plain, records)
    )
    assert "data" in differing(first, second)


def test_the_versions_of_libraries_that_decide_a_result_count(good: str) -> None:
    assert "tokenizers" in load_graph(good).cells[0].parts
    tuned = good.replace("tokens: 100k", "tokens: 100k, lora: {rank: 4}")
    assert "peft" in cell(tuned, "block").parts
    assert not {"peft", "tokenizers", "transformers"} & cell(good, "block").parts.keys()
    here = identify("data", {}, {}, "c", libraries=("tokenizers",))
    assert here[1]["tokenizers"] == version("tokenizers")
    assert here[0] != identify("data", {}, {}, "c")[0]


def test_digests_of_files_are_remembered_by_a_run_alone(good: str, tmp_path: Path) -> None:
    text, home = tmp_path / "a.txt", tmp_path / "home"
    text.write_text("some text\n" * 100)
    workflow = good.replace("source: python", f"source: {{text: {text}}}")
    before = load_graph(workflow, home=home).cells[0].identity
    assert not home.exists()
    assert load_graph(workflow, home=home, remember=True).cells[0].identity == before
    memory = home / "contents.json"
    assert load_graph(workflow, home=home).cells[0].identity == before
    memory.write_text("not JSON")
    assert load_graph(workflow, home=home).cells[0].identity == before
    text.write_text("other text\n" * 100)
    assert load_graph(workflow, home=home, remember=True).cells[0].identity != before


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package of two files, one of them below a folder."""
    folder = tmp_path / "kvlab_test_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inner" / "rule.py").write_text("RULE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.fixture
def digest(package: Path) -> Callable[[], str]:
    def fresh() -> str:
        code_digest.cache_clear()
        identity._module_digest.cache_clear()
        return code_digest((package.name,))

    return fresh


def test_code_counts_and_nothing_beside_it(package: Path, digest: Callable[[], str]) -> None:
    before = digest()
    (package / "README.md").write_text("words")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "rule.py").write_text("")
    assert digest() == before
    assert package.name not in sys.modules
    (package / "inner" / "rule.py").write_text("RULE = 2\n")
    assert digest() != before


def test_moving_code_between_files_counts(package: Path, digest: Callable[[], str]) -> None:
    before = digest()
    (package / "inner" / "rule.py").rename(package / "inner" / "rules.py")
    assert digest() != before


def cell(good: str, job: str) -> Cell:
    return next(cell for cell in load_graph(good).cells if cell.job == job)


def test_measured_jobs_belong_to_a_machine(good: str) -> None:
    assert {"machine device", "machine threads", "machine driver"} <= cell(
        good, "speed"
    ).parts.keys()
    assert not any(part.startswith("machine") for part in cell(good, "quality").parts)
    spec = {"prompt": 1}
    here, _ = identify("benchmark", spec, {}, "c", {"device": "a", "threads": 2, "driver": None})
    there, _ = identify("benchmark", spec, {}, "c", {"device": "a", "threads": 4, "driver": None})
    assert here != there


def test_what_a_cluster_measured_is_reused_on_that_cluster_alone(good: str) -> None:
    def stale(first: str | None, second: str | None) -> set[str]:
        one, two = load_graph(good, cluster=first), load_graph(good, cluster=second)
        return {
            a.job for a, b in zip(one.cells, two.cells, strict=True) if a.identity != b.identity
        }

    assert stale("ray://a:1", "ray://a:1") == set()
    assert stale("ray://a:1", "ray://b:1") == {"speed"}
    assert stale(None, "ray://a:1") == {"speed"}


def test_the_kind_and_the_role_of_a_parent_count() -> None:
    assert identify("train", {}, {}, "c")[0] != identify("uptrain", {}, {}, "c")[0]
    assert identify("up", {}, {"from": "x"}, "c")[0] != identify("up", {}, {"of": "x"}, "c")[0]


def test_why_names_the_parts_that_changed(good: str) -> None:
    before = cell(good, "base").parts
    now = cell(good.replace("400k", "1M").replace("bpe: 2048", "bpe: 999"), "base").parts
    names = changed(before, now)
    assert names == ["model", "tokens", "parent data"]
    said = [explain(name, before, now) for name in names]
    assert said == ["model", "tokens 400000 -> 1000000", "parent data"]


def test_fewer_cpus_are_another_machine(good: str) -> None:
    """`--cpus 1` gives a benchmark one thread, so its numbers are not those of all CPUs."""
    for limit, threads in ((1, "1"), (None, str(machine.cpus()))):
        speed = [c for c in load_graph(good, cpus=limit).cells if c.kind == "benchmark"]
        assert {c.parts["machine threads"] for c in speed} == {threads}
    one, other = (
        {c.name: c.identity for c in load_graph(good, cpus=limit).cells} for limit in (1, 7)
    )
    assert {name for name in one if one[name] != other[name]} == {c.name for c in speed}


def test_a_containers_share_of_the_cpus_counts(tmp_path: Path, monkeypatch: Any) -> None:
    share = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "_SHARE", share)
    for text, expected in (("100000 100000", 1), ("150000 100000", 1), ("1000 100000", 1)):
        share.write_text(text)
        assert machine.cpus() == expected
    share.write_text("max 100000")
    assert machine.cpus() == len(os.sched_getaffinity(0))
