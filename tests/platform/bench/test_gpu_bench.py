"""The benches of kernels and papers, on a CPU at tiny sizes: twins answer on both sides."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvlab.kernels
from kvlab.kernels import choice
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.platform.bench import __main__ as command
from kvlab.platform.bench import page
from kvlab.platform.bench.kernels import (
    blocks,
    controller,
    cosine,
    decode,
    eviction,
    prefill,
    query,
    select,
    stored,
)
from kvlab.platform.bench.line import Line
from kvlab.platform.bench.papers import adore, sharing, side, squeeze
from kvlab.platform.bench.papers import blocks as block_transformer

REPOSITORY = Path(__file__).parents[3]
PAGE = REPOSITORY / "docs" / "results" / "kernels.md"
BLOCKER = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Absent())
"""
EVERY = """
from kvlab.platform.bench import __main__ as command

for name in command.wanted("kernels,papers", gpu=True)[0]:
    lines = list(command.measure(name, False))
    assert lines, name
    assert all(not line.void for line in lines), lines
    print(name)
"""
KERNELS = [decode, stored, prefill, eviction, blocks, cosine, query, select, controller]
ABSENT = {
    "ray", "pydantic", "mlflow", "optuna", "transformers", "tokenizers", "safetensors", "vllm",
    "sqlalchemy", "alembic", "typer", "rich", "yaml", "plotly", "jinja2", "fsspec", "peft",
    "datasets", "pytest",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bench", KERNELS)
def test_every_kernel_passes_its_gate_and_has_its_time(bench: Any, dtype: torch.dtype) -> None:
    lines = list(bench.run("cpu", dtype))
    assert lines
    for line in lines:
        assert line.void == ""
        assert line.ours > 0
        assert line.theirs is not None
        assert line.theirs > 0
        assert line.met is None  # targets are a GPU's
    beside_twins = [line for line in lines if line.beside == "twin"]
    assert len({line.name for line in lines}) == len(beside_twins)
    for line in beside_twins:
        assert line.detail is not None
        assert {"kvlab", "twin"} <= set(line.detail["microseconds"])
        assert line.detail["share_of_ceiling"] > 0


@pytest.mark.parametrize("bench", [block_transformer, squeeze, adore, sharing])
def test_every_paper_has_both_sides(bench: Any) -> None:
    lines = list(bench.run("cpu", torch.float32))
    assert lines
    for line in lines:
        assert line.void == ""
        assert line.ratio is not None
        assert line.ratio > 0
        assert line.detail is not None
        assert line.detail["graphs"] is False
        assert line.detail["ours"]["not_captured"] == "no CUDA device"
        assert line.detail["paper"]


def test_the_grid_begins_at_its_most_telling_corner() -> None:
    found = list(decode.points((32, 128, 1), (4096, 64)))
    assert found[0] == (32, 4096)
    assert set(found[:3]) == {(32, 4096), (32, 64), (128, 4096)}
    assert len(found) == len(set(found)) == 6


def test_twins_can_be_chosen_and_every_dispatch_asks() -> None:
    on_gpu = torch.empty(0, device="meta")
    assert not choice.fused(on_gpu)
    with choice.torch_only():
        assert choice._twins_alone
        with pytest.raises(ZeroDivisionError), choice.torch_only():
            raise ZeroDivisionError
        assert choice._twins_alone
    assert not choice._twins_alone
    (folder,) = kvlab.kernels.__path__
    asking = [f.name for f in Path(folder).glob("*.py") if ".is_cuda" in f.read_text()]
    assert asking == ["choice.py"]  # elsewhere `fused` decides, or `torch_only` would not hold


class Bounded(TokenModel):
    """Fits a batch of three at most."""

    def start(self, ids: Tensor, *given: Any, **more: Any) -> Any:
        if len(ids) > 3:
            raise torch.OutOfMemoryError
        return super().start(ids, *given, **more)


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side, "ON_CPU", 8)
    own = side.Side("full", squeeze.mistral("cpu"))
    model = Bounded(own.config, side.resolve({})).eval()
    work = side.Workload(8, 40)
    found = side.throughput(model, own, work, torch.device("cpu"))
    assert found.batch == 3
    assert found.kv_bytes >= 3 * 48 * 4 * 2 * 2 * 8 * 4  # batch, rows, layers, k and v, heads
    monkeypatch.setattr(Bounded, "start", TokenModel.start)
    assert side.throughput(model, own, work, torch.device("cpu")).batch == 8


@pytest.mark.parametrize("applied", [{}, {"h2o": {}, "uniform": {"tokens": 12}}])
def test_a_session_is_brought_on_as_if_it_had_read(applied: dict[str, Any]) -> None:
    config = squeeze.mistral("cpu")
    model = side.made(side.Side("full", config), torch.device("cpu"), torch.float32)
    prompts = torch.randint(config.vocab_size, (2, 9))
    more = {"new_tokens": 40, "apply": side.resolve(applied)}
    with torch.inference_mode():
        brought, read = (model.start(prompts, **more) for _ in range(2))
        side.advance(brought, prompts, 13)
        read.extend(torch.cat((prompts, prompts[:, :4]), 1))
        for session in (brought, read):
            side.go_on(session)
    ours, theirs = brought._cache.state(), read._cache.state()
    assert ours.keys() == theirs.keys()
    assert ours["seen"][0] == theirs["seen"][0]  # after a turn a full cache expects padding
    assert torch.equal(brought._next, read._next)
    places = [name for name in ours if "positions" in name]
    assert places
    for name in places:
        held = [(state[name] >= 0).sum(-1) for state in (ours, theirs)]
        assert torch.equal(*held)
        if not applied:
            assert torch.equal(ours[name], theirs[name])


def test_a_paper_whose_side_fails_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> side.Throughput:
        raise RuntimeError("no batch of it fits")

    monkeypatch.setattr(side, "throughput", fails)
    config = squeeze.mistral("cpu")
    pair = side.Pair(side.Side("full", config, kernels=False), "cpu", torch.float32)
    line = pair.line(side.Side("ours", config), side.Workload(8, 40), "2x")
    assert line.void == "raised RuntimeError: no batch of it fits"
    assert line.met is False


def test_half_a_pair_without_a_graph_counts_neither() -> None:
    both = side.Throughput(4, 100, 1.0, 0, eager=0.04, replayed=0.01, not_captured="")
    assert both.rate(graph=True) == pytest.approx(400 / 2)
    assert both.rate(graph=False) == pytest.approx(400 / 5)


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    found = [*decode.run("cpu", torch.float32), *squeeze.run("cpu", torch.float32)]
    point = {"batch": 2, "rows": 7}
    detail = {"kernel": "decode attention", "point": point}
    void = Line("broken", "GB/s", 0.0, least_ratio=1.0, void="output is wrong", detail=detail)
    return [*found, void, Line("startup", "s", 1.0, better="less", limit=2.0)]


def test_the_page_has_both_sides_absolute(lines: list[Line], tmp_path: Path) -> None:
    file = tmp_path / "results" / "kernels.md"
    page.write(file, lines, ["papers.adore: its time was up after 1 lines"])
    text = file.read_text()
    assert "### Decode attention\n\n| batch | rows | kvlab, µs | twin, µs |" in text
    assert "| 2 | 7 | – | – |" in text
    assert "VOID: output is wrong" in text
    assert "## Papers" in text
    assert "neither: no CUDA device" in text
    assert "startup" in text
    assert "- papers.adore: its time was up after 1 lines" in text
    assert f"torch {torch.__version__}" in text
    assert "```sh\nmake bench-gpu\n```" in text
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.M):
        assert len({row.count("|") for row in table.splitlines()}) == 1


def test_an_event_timed_number_is_marked(lines: list[Line]) -> None:
    (line, *_) = lines
    assert line.detail is not None
    marked = {**line.detail, "timed_by": {**line.detail["timed_by"], "twin": "events"}}
    one = Line(line.name, line.unit, line.ours, line.theirs, line.beside, detail=marked)
    row = page.page([one], [], "today").split("### ")[1].splitlines()[4]
    assert [cell.strip().endswith("*") for cell in row.split("|")[3:6]] == [False, True, False]


def test_the_page_in_the_repository_is_the_writers() -> None:
    text = PAGE.read_text()
    assert text.startswith(page.TITLE)
    if "Not measured yet" in text:
        assert text == page.unmeasured()


@pytest.mark.parametrize("gpu", [False, True])
def test_a_name_stands_for_all_under_it(gpu: bool) -> None:
    names, unknown = command.wanted("kernels,papers.adore,kernel", gpu=gpu)
    assert names[:2] == ["kernels.decode", "kernels.stored"]
    assert names[-1] == "papers.adore"
    assert len(names) == len(KERNELS) + 1
    assert unknown == ["kernel"]


def test_a_bench_is_cut_off_and_what_it_found_counts(tmp_path: Path) -> None:
    file = tmp_path / "lines.json"
    assert command.here("kernels.blocks", False, file, 0.0) == command.LATE
    assert len(json.loads(file.read_text())["lines"]) == 1
    found = command.apart("kernels.blocks", False, 0.0)
    assert len(found.lines) == 1
    assert found.cut
    assert not found.failed


def test_a_bench_that_fails_on_its_way_keeps_its_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(name: str, gpu: bool) -> Iterator[Line]:
        yield Line("first", "s", 1.0)
        raise ValueError("second")

    monkeypatch.setattr(command, "measure", half)
    file = tmp_path / "lines.json"
    with pytest.raises(ValueError, match="second"):
        command.here("kernels.blocks", False, file, None)
    assert len(json.loads(file.read_text())["lines"]) == 1


def test_kernels_and_papers_need_little_but_torch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.replace("{absent}", repr(ABSENT)))
    (tmp_path / "every.py").write_text(EVERY)
    written, told = tmp_path / "bench.json", tmp_path / "kernels.md"

    def run(*words: str) -> str:
        path = os.pathsep.join([str(tmp_path), str(REPOSITORY / "src")])
        done = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    measured = run("every.py").splitlines()
    assert sorted(measured) == sorted(
        name for name in command.ON_GPU if name.startswith(("kernels.", "papers."))
    )
    table = run(
        *("-m", "kvlab.platform.bench", "--only", "kernels.eviction,papers.adore"),
        *("--json", str(written), "--page", str(told)),
    )
    found = json.loads(written.read_text())
    assert found["failed"] == []
    assert all(not line["void"] for line in found["lines"])
    assert "no safetensors here" in table  # so the finder was in force
    assert "## Papers" in told.read_text()
