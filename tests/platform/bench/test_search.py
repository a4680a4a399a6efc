"""The search bench, at a size that only shows that it measures what it says."""

from __future__ import annotations

import pytest

from kvlab.platform.bench import search


@pytest.mark.postgres
def test_every_line_compares_as_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ASKERS", 2)
    monkeypatch.setattr(search, "TOLD", 15)
    monkeypatch.setattr(search, "ROUNDS", 2)
    monkeypatch.setattr(search, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(search, "OWN", 3)
    lines = search.run()
    assert [line.beside for line in lines] == [
        *["Optuna on SQLite"] * 3,
        *["Optuna on PostgreSQL"] * 3,
    ] * len(search.SAMPLERS)
    for line in lines:
        assert line.detail is not None
        calls = 3 if line.name.startswith("sampler's own time") else 2 * 2
        assert len(line.detail["ours"]) == len(line.detail["theirs"]) == calls
        assert line.ours > 0
    assert {line.name for line in lines if line.limit is not None} == {
        f"ask, 2 threads, {sampler}, 15 trials told" for sampler in search.SAMPLERS
    }
