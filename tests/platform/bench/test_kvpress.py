"""The bench beside kvpress: same checkpoint, same prompts, same tokens, or no number."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kvlab import KvlabError
from kvlab.methods.decoder.config import llama
from kvlab.methods.decoder.generation import generate
from kvlab.methods.store import load
from kvlab.platform.bench import __main__ as command
from kvlab.platform.bench import kvpress
from kvlab.platform.bench.kvpress import Pair

with_kvpress = pytest.mark.skipif(
    not kvpress.PYTHON.exists(),
    reason=f"no {kvpress.PYTHON.parent.parent.name}: `make bench` sets it up",
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvpress, "VOCABULARY", 64)
    monkeypatch.setattr(kvpress, "SIZES", llama(64, 4, 4, 2, 96, max_positions=256))
    monkeypatch.setattr(kvpress, "SPREAD", 0.2)
    monkeypatch.setattr(kvpress, "PROMPTS", (48,))
    monkeypatch.setattr(kvpress, "BATCHES", (2,))
    monkeypatch.setattr(kvpress, "GENERATE", 6)
    monkeypatch.setattr(kvpress, "REPEATS", 2)
    monkeypatch.setattr(kvpress, "PAIRS", tuple(narrow(pair) for pair in kvpress.PAIRS))


def narrow(pair: Pair, window: int = 6) -> Pair:
    """The same with a window that a short prompt has room for."""
    if "window_size" not in pair.settings:
        return pair
    settings = {**pair.settings, "window_size": window}
    ours = {"snapkv": {**pair.ours["snapkv"], "window": window}}
    return Pair(pair.name, pair.press, pair.ratio, settings, ours, pair.budget)


@with_kvpress
def test_every_press_gives_the_tokens_of_our_policy() -> None:
    *lines, mean = kvpress.run()
    assert [line.name.split(": ")[1] for line in lines] == [p.name for p in kvpress.PAIRS]
    for line in lines:
        assert line.void == ""
        assert line.ours > 0
        assert line.detail is not None
        assert line.detail["way"] in kvpress.WAYS
        assert line.detail["versions"]["kvpress"] == "0.5.5"
        assert line.detail["versions"]["threads"] == torch.get_num_threads()
    rows = {line.name.split(": ")[1]: line.detail["rows_kept"] for line in lines if line.detail}
    generated = kvpress.GENERATE - 1
    assert set(rows["full cache"]) == {48 + generated}
    assert set(rows["SnapKV, 20 % kept"]) == {9 + generated}
    pyramid = rows["PyramidKV, 50 % kept"]
    assert pyramid == sorted(pyramid, reverse=True)
    assert pyramid[0] > pyramid[-1]
    assert mean.unit == "x"


@with_kvpress
def test_a_number_of_unequal_work_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Pair(
        "StreamingLLM with other sinks",
        "StreamingLLMPress",
        0.8,
        {"n_sink": 4},
        {"streaming_llm": {"sinks": 0, "positions": "absolute", "generated": "keep"}},
    )
    monkeypatch.setattr(kvpress, "PAIRS", (wrong,))
    (line,) = kvpress.run()
    assert "continuations differ" in line.void
    assert line.ratio is None


@with_kvpress
def test_both_ways_give_the_same_tokens(tmp_path: Path) -> None:
    kvpress.write(tmp_path)
    prompts = kvpress.prompts_of(48, 2).tolist()
    with kvpress.Theirs(tmp_path, 1) as theirs:
        for pair in kvpress.PAIRS:
            found = [theirs.once(pair, prompts, way) for way in kvpress.WAYS]
            assert found[0]["tokens"] == found[1]["tokens"]
            assert min(side[part] for side in found for part in ("prefill", "decode")) > 0


@with_kvpress
def test_what_the_worker_cannot_do_is_one_line_and_it_goes_on(tmp_path: Path) -> None:
    kvpress.write(tmp_path)
    with kvpress.Theirs(tmp_path, 1) as theirs:
        with pytest.raises(KvlabError, match=r"kvpress: AttributeError.*NoSuchPress"):
            theirs.once(Pair("none", "NoSuchPress"), [[1, 2, 3]], "steps")
        assert theirs.once(kvpress.PAIRS[0], [[1, 2, 3]], "steps")["rows"] == [8] * 4


def test_the_checkpoint_is_one_that_we_read(tmp_path: Path) -> None:
    kvpress.write(tmp_path)
    model = load(tmp_path).eval()
    prompts = kvpress.prompts_of(48, 2)
    for pair in kvpress.PAIRS:
        rows = generate(model, prompts.tolist(), 3, apply=pair.applied(48))
        assert [len(row) for row in rows] == [3, 3]


def test_without_the_environment_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvpress, "PYTHON", tmp_path / "none/bin/python")
    file = tmp_path / "lines.json"
    assert command.main(["--here", "--only", "kvpress", "--json", str(file)]) == 1
    assert "`make bench` sets it up" in capsys.readouterr().err
    assert not file.exists()


def test_a_worker_that_ends_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = tmp_path / "ends.py"
    ends.write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.setattr(kvpress, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(kvpress, "WORKER", ends)
    with pytest.raises(KvlabError, match=r"worker (ended|is gone)"):
        kvpress.Theirs(tmp_path, 1)


def test_the_geometric_mean_is_stated() -> None:
    line = kvpress.overall([1.0, 4.0])
    assert line.ours == pytest.approx(2.0)
    assert line.met is None
    assert "of the 2 ratios" in line.name
