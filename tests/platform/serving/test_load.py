"""The load client: what it asks, that it keeps its times, and what it makes of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve
from kvlab.platform.jobs.local import run_cell
from kvlab.platform.jobs.serve_benchmark.run import _figures, percentiles
from kvlab.platform.serving.load import null
from kvlab.platform.serving.load.arrivals import Load
from kvlab.platform.serving.load.client import Asked, Client

LOAD = Load(40, (10, 20), (3, 6), turns=2, shared_prefix=5, vocabulary=97)
SLO = {"first_token": 0.5, "between_tokens": 0.1}


class TestArrivals:
    def test_what_is_asked_is_the_same_at_every_rate(self) -> None:
        slow, fast = LOAD.drawn(2.0, 7), LOAD.drawn(20.0, 7)
        assert [c.turns for c in slow] == [c.turns for c in fast]
        assert slow[-1].start == pytest.approx(10 * fast[-1].start)
        assert LOAD.drawn(2.0, 7) == slow
        assert LOAD.drawn(2.0, 8) != slow

    def test_lengths_and_beginnings(self) -> None:
        found = LOAD.drawn(2.0, 7)
        assert len(found) == 20
        shared = found[0].turns[0].added[:5]
        for conversation in found:
            first, second = conversation.turns
            assert first.added[:5] == shared
            assert 10 <= len(first.added) - 5 <= 20
            assert 10 <= len(second.added) <= 20
            assert all(3 <= turn.answer <= 6 for turn in conversation.turns)
            assert all(0 < token < 97 for turn in conversation.turns for token in turn.added)
        assert LOAD.longest == 5 + 2 * (20 + 6)

    def test_they_come_at_their_rate(self) -> None:
        many = Load(4000, (1, 1), (1, 1), 1, 0, 9).drawn(50.0, 0)
        assert many[-1].start == pytest.approx(4000 / 50, rel=0.05)


class TestClient:
    def test_against_a_server_that_does_nothing(self) -> None:
        with null.started() as url:
            found, seconds = Client(url, "x", {}).run(LOAD.drawn(100.0, 0))
        assert len(found) == 40
        assert not [asked.error for asked in found if asked.error]
        assert seconds < 10
        for asked in found:
            assert 3 <= asked.tokens == len(asked.chunks) <= 6
            assert asked.sent >= asked.due - 0.001

    def test_a_conversation_repeats_what_was_said(self) -> None:
        with null.started() as url:
            found, _ = Client(url, "x", {}).run(LOAD.drawn(100.0, 0)[:1])
        first, second = found
        (one, two) = LOAD.drawn(100.0, 0)[0].turns
        assert (first.prompt, second.prompt) == (
            len(one.added),
            len(one.added) + one.answer + len(two.added),
        )

    def test_nobody_answers(self) -> None:
        found, _ = Client("http://127.0.0.1:9", "x", {}).run(LOAD.drawn(100.0, 0)[:2])
        assert all(asked.error for asked in found)


def test_figures() -> None:
    good = Asked(due=1.0, sent=1.0, prompt=5, chunks=[1.2, 1.25, 1.3], tokens=3)
    slow = Asked(due=1.0, sent=1.0, prompt=5, chunks=[1.2, 1.9], tokens=2)
    late = Asked(due=1.0, sent=1.4, prompt=5, chunks=[1.6], tokens=1)
    lost = Asked(due=1.0, sent=1.0, prompt=5, error="500: no")
    found = _figures(2.0, [good, slow, late, lost], 4.0, SLO)
    assert found["completed"] == 3
    assert found["goodput"] == 1 / 4
    assert found["tokens_per_second"] == 6 / 4
    assert found["errors"] == ["500: no"]
    assert found["late"] == pytest.approx(0.4)
    assert found["time_to_first_token"]["p99"] == pytest.approx(0.6)
    assert found["inter_token"]["p50"] == pytest.approx(0.05)


def test_percentiles() -> None:
    found = percentiles([float(n) for n in range(100, 0, -1)])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert percentiles([]) == {"p50": 0.0, "p90": 0.0, "p99": 0.0}


def test_a_served_model_under_load(tmp_path: Path) -> None:
    """The real server, more requests than its pool has room for, two turns each."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tokenizers import Tokenizer, models

    base = tmp_path / "base"
    base.mkdir()
    build(DecoderConfig(257, **llama(64, 2, 2, 1, 96)), resolve({})).save(base)
    words = {f"w{number}": number for number in range(257)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(base / "tokenizer.json"))
    spec: dict[str, Any] = {
        "apply": resolve({"h2o": {}, "uniform": {"tokens": 8}}).to_dict(), "rates": [20.0, 200.0],
        "requests": 24, "prompt": [8, 24], "generate": [4, 8], "turns": 2, "shared_prefix": 4,
        "slo": SLO, "memory": 1 << 16, "concurrency": 16, "dtype": "auto", "seed": 0,
    }  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    found = run_cell("serve_benchmark", spec, {"of": base}, out)
    assert found["gates"]["complete"]
    assert [row["rate"] for row in found["rates"]] == [20.0, 200.0]
    for row in found["rates"]:
        assert row["completed"] == 24
        assert row["preemptions"] == 0
        assert row["tokens_per_second"] > 0
        assert 0 < row["time_to_first_token"]["p50"] <= row["time_to_first_token"]["p99"]
    assert found["pool"]["blocks"] > 1
    assert found["client"]["completed"] > 0
    assert (out / "server.log").is_file()
