"""Every module that a job runs is hashed with it, and none that it does not run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import kvlab
from kvlab.methods.registry import REGISTRY, resolve
from kvlab.platform.graph import Cell
from kvlab.platform.jobs import KINDS
from kvlab.platform.spec import identity
from kvlab.platform.spec.read import load_graph

CHOSEN = "a list of what there is: what is chosen is hashed with its value"
HARMLESS = {
    "kvlab.methods.cache.sources": "names what is hashed",
    "kvlab.methods.catalog": CHOSEN,
    "kvlab.platform.artifacts": "moves folders that are whole, and changes nothing in them",
    "kvlab.platform.record.fault": "does something in tests alone",
    "kvlab.methods.sharing.convert": "runs where a model is converted, and is hashed there",
    "kvlab.methods.sharing.values": CHOSEN,
    "kvlab.methods.sharing.layouts": CHOSEN,
    "kvlab.methods.sharing.layer_types": CHOSEN,
    "kvlab.platform.jobs.context": "the door through which jobs are seen, no part of what they do",
}
"""Modules that jobs import and whose change makes nothing stale, and why."""

RUN = """
import importlib, json, os, sys
import torch

modules, cases = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)

def run(method, apply):
    from kvlab.methods.axis import TRAIN_TIME, Method
    from kvlab.methods.build import build
    from kvlab.methods.cache.opening import scores_in_one_pass
    from kvlab.methods.cost import cost_of
    from kvlab.methods.decoder.config import DecoderConfig, llama
    from kvlab.methods.registry import from_dict
    model = build(DecoderConfig(64, **llama(32, 4, 2, 1, 64)), from_dict(method))
    ids = torch.arange(1, 49).view(2, 24)
    model(ids).nll.sum().backward()
    cost_of(model.config, model.method).train_flops_per_token(24)
    if apply is None:
        return
    under = from_dict(apply)
    if scores_in_one_pass(model.acting, under):
        model(ids, apply=under)
    session = model.start(ids, new_tokens=8, apply=under)
    session.step(ids[:, 0])
    session.extend(ids[:, :4])
    if any("benchmark" in module for module in modules):
        run_time = {axis: c for axis, c in under.choices.items() if axis not in TRAIN_TIME}
        whole = Method("", {**model.method.choices, **run_time})
        cost_of(model.config, whole).kv_bytes_per_token(28, 4, 24)

torch.set_num_threads(1)
for case in cases:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    if case is not None:
        run(*case)
    print(json.dumps([name for name, module in sys.modules.items()
                      if name.startswith("kvlab.") and getattr(module, "__file__", None)
                      and not module.__file__.endswith("__init__.py")]), flush=True)
    os._exit(0)
"""
"""Trains a step under a method and generates under `apply`, each case in a process of its own."""


def imported(modules: list[str], cases: Sequence[Any]) -> list[set[str]]:
    """Modules of kvlab that a process has which imported these, then ran a case, for each case.

    A case is (method, apply); apply may be None: nothing is generated. None itself runs nothing.
    """
    asked = json.dumps([modules, cases])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, asked], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return [set(json.loads(line)) for line in ran.stdout.splitlines()]


def missing(found: set[str], sources: set[str]) -> set[str]:
    """Modules that no source stands for."""
    return {
        name
        for name in found - HARMLESS.keys()
        if not any(name == source or name.startswith(f"{source}.") for source in sources)
        and not name.endswith(".params")
    }


def unhashed(sources: set[str], modules: list[str], *case: Any) -> set[str]:
    """Modules that a fresh process imports for these and a case, and that no source stands for."""
    return missing(imported(modules, [case or None])[0], sources)


def hashed(of: Cell, cells: Mapping[str, Cell]) -> set[str]:
    """The sources of a cell and of all that it comes from."""
    own = set(KINDS[of.kind].sources(of.spec))
    return own.union(*(hashed(cells[name], cells) for name in of.parents.values()))


@pytest.mark.parametrize("job", ["data", "base", "block", "quality", "speed"])
def test_every_module_that_a_job_runs_is_hashed_with_it_or_its_parents(good: str, job: str) -> None:
    cells = {cell.name: cell for cell in load_graph(good).cells}
    last = [cell for cell in cells.values() if cell.job == job][-1]
    trained = last if "method" in last.spec else cells.get(last.parents.get("of", ""))
    case = [] if trained is None else [trained.spec["method"], last.spec.get("apply")]
    sources = hashed(last, cells)
    assert not unhashed(sources, [f"kvlab.platform.jobs.{last.kind}.run"], *case)
    assert "kvlab.methods.decoder.huggingface.writer" not in sources


FIXED = """\
  groups:
    calibrate: {of: base}
  squeezed:
    evaluate: {of: base, apply: h2o, budgets: groups}
  timed:
    benchmark: {of: base, apply: h2o, budgets: groups}
report:"""


@pytest.mark.parametrize("job", ["groups", "squeezed", "timed"])
def test_every_module_that_calibrates_or_takes_budgets_is_hashed(good: str, job: str) -> None:
    cells = {cell.name: cell for cell in load_graph(good.replace("report:", FIXED)).cells}
    last = [cell for cell in cells.values() if cell.job == job][-1]
    sources = KINDS[last.kind].sources(last.spec)
    modules, case = [f"kvlab.platform.jobs.{last.kind}.run"], []
    if job != "groups":
        assert last.parents["budgets"].startswith("groups")
        modules.append("kvlab.platform.jobs.calibrate.fixed")
        per_layer = {"per_layer": {"tokens": [4, 4, 4, 4]}}
        case = [{}, {**last.spec["apply"], "budget": per_layer}]
        assert "kvlab.platform.jobs.calibrate.fixed" in sources
    assert not unhashed(hashed(last, cells), modules, *case)
    plain = next(cell for cell in cells.values() if cell.job == "quality")
    assert not any("calibrate" in source for source in KINDS["evaluate"].sources(plain.spec))


def test_what_reads_checkpoints_people_have_is_hashed_where_one_is_read() -> None:
    model = {"checkpoint": "somewhere", "fingerprint": ""}
    sources = set(KINDS["train"].sources({"model": model, "method": {}}))
    reader = "kvlab.methods.decoder.huggingface.reader"
    assert reader in sources
    assert not unhashed(sources, [reader])
    assert reader not in KINDS["train"].sources({"model": {"config": {}}, "method": {}})


@pytest.mark.parametrize("kind", ["train", "uptrain", "evaluate", "benchmark"])
def test_sharing_counts_where_it_is_chosen_and_its_conversion_where_one_runs(kind: str) -> None:
    plain = {"model": {"config": {}}, "method": {}, "apply": {}}
    shared = {**plain, "method": {"sharing": {"cla": {}}}}
    found = {source for source in KINDS[kind].sources(plain) if "sharing" in source}
    assert ("kvlab.methods.sharing.convert" in found) == (kind == "uptrain")
    assert "kvlab.methods.sharing" not in found
    if kind in ("train", "uptrain"):
        assert "kvlab.methods.sharing" in KINDS[kind].sources(shared)


OWN: dict[str, dict[str, Any]] = {"adore": {"scores": "rule"}, "snapkv": {"window": 4}}


def applied() -> dict[str, dict[str, Any]]:
    """Every eviction, budget and precision as an evaluation has it."""
    found: dict[str, dict[str, Any]] = {}
    for value in REGISTRY.values("eviction"):
        found[value.name] = {value.name: OWN.get(value.name, {})}
        if "budget" in value.consumes:
            found[value.name]["uniform"] = {"tokens": 10}
    found["sliding_window, a window"] = {"sliding_window": {"window": 8}}
    for budget in REGISTRY.values("budget"):
        amount = [4, 4, 4, 4] if budget.name == "per_layer" else 10
        found[budget.name] = {"h2o": {}, budget.name: {"tokens": amount}}
    for precision in REGISTRY.values("precision"):
        found[precision.name] = {precision.name: {}}
    return {name: resolve(written).to_dict() for name, written in found.items()}


@pytest.mark.parametrize("kind", ["evaluate", "benchmark"])
def test_every_module_that_a_job_runs_under_a_choice_is_hashed(kind: str) -> None:
    trained = KINDS["train"].sources({"model": {"config": {}}, "method": {}})
    before = {*KINDS["data"].sources({}), *trained}
    cases = applied()
    modules = [f"kvlab.platform.jobs.{kind}.run"]
    ran = imported(modules, [({}, apply) for apply in cases.values()])
    found = {
        name: missing(each, before.union(KINDS[kind].sources({"apply": apply})))
        for (name, apply), each in zip(cases.items(), ran, strict=True)
    }
    assert not any(found.values()), found


SERVED = """\
  cut:
    evaluate: {of: base, apply: {h2o: {}, uniform: {share: 0.5}}}
  asked:
    evaluate: {of: base, engine: vllm, metrics: [recall]}
  served:
    benchmark: {of: block, engine: vllm, prompt: 64, generate: 8, batch: [1]}
  load:
    serve_benchmark: {of: base}
report:"""
BY_SERVER = {"asked", "served", "load"}
ALL_BUT_DATA = {"base", "block", "quality", "speed", "cut"} | BY_SERVER
STALE = {
    "methods/cache/arena.py": BY_SERVER,
    "methods/cache/pool.py": BY_SERVER,
    "methods/cache/ragged.py": BY_SERVER,
    "methods/block_transformer/serving.py": BY_SERVER,
    "methods/cache/evicting.py": BY_SERVER | {"cut"},
    "methods/cache/slots.py": BY_SERVER | {"quality", "speed"},
    "methods/eviction/full/policy.py": BY_SERVER | {"quality", "speed"},
    "methods/cache/ephemeral.py": ALL_BUT_DATA,
}
"""What an edit of a file makes stale."""
WITH_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@WITH_VLLM
def test_an_edit_makes_stale_what_runs_it(
    good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = load_graph(good.replace("report:", SERVED)).cells

    def codes() -> dict[str, str]:
        identity.code_digest.cache_clear()
        identity._module_digest.cache_clear()
        return {c.name: identity.code_digest(KINDS[c.kind].sources(c.spec)) for c in cells}

    before = codes()
    assert before == {cell.name: cell.parts["code"] for cell in cells}
    copy, found = tmp_path / "kvlab", {}
    shutil.copytree(Path(kvlab.__file__).parent, copy)
    with monkeypatch.context() as patched:
        patched.setattr(kvlab, "__file__", str(copy / "__init__.py"))
        for name in STALE:
            code = (copy / name).read_bytes()
            (copy / name).write_bytes(code + b"# edited")
            now = codes()
            found[name] = {cell.job for cell in cells if now[cell.name] != before[cell.name]}
            (copy / name).write_bytes(code)
    assert codes() == before
    assert found == STALE


@WITH_VLLM
def test_every_module_that_serves_is_hashed(good: str) -> None:
    cells = {cell.name: cell for cell in load_graph(good.replace("report:", SERVED)).cells}
    modules = ["kvlab.platform.serving.opened", "kvlab.platform.serving.vllm_0_32.model"]
    ran = imported(modules, [None])[0]
    last = {cell.job: cell for cell in cells.values() if cell.job in BY_SERVER}
    assert last.keys() == BY_SERVER
    found = {job: missing(ran, hashed(cell, cells)) for job, cell in last.items()}
    assert not any(found.values()), found
