"""The recorded response surface: whole, and searched without running anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvlab.platform.bench import surface as bench
from kvlab.platform.bench.surface import CHEAP, CHEAP_TRIALS, MOST, SHARE, Search, Surface


@pytest.fixture(scope="module")
def surface() -> Surface:
    return Surface.read()


def test_every_point_of_its_space_was_measured_twice(surface: Surface) -> None:
    keys = {surface.space.key(values) for values in surface.space.points()}
    assert keys == surface.whole.keys() == surface.cheap.keys()
    assert len(keys) == 243
    for key in keys:
        whole, cheap = surface.whole[key], surface.cheap[key]
        assert whole["kv_bytes_per_token"] == cheap["kv_bytes_per_token"]
        assert whole["kl"] != cheap["kl"]


def test_the_goal_is_a_share_of_what_all_points_reach(surface: Surface) -> None:
    search = Search(surface)
    ranked = sorted(surface.space.points(), key=lambda values: surface.measure(values)["kl"])
    for values in ranked[:150]:
        search.take(values)
    by_hand = surface.volume(search.found)
    assert (by_hand >= surface.goal) == search.over
    assert surface.goal == pytest.approx(SHARE * surface.volume(list(surface.whole.values())))


def test_a_repeat_costs_a_trial_and_finds_nothing(surface: Surface) -> None:
    search, values = Search(surface), next(surface.space.points())
    assert search.take(values) == search.take(values)
    assert (search.cost, len(search.found)) == (2, 1)


@pytest.mark.parametrize("search", [bench.ours, bench.started, bench.from_cheap])
def test_a_seed_decides_what_a_search_costs(surface: Surface, search) -> None:
    cost = search(surface, 3)
    assert cost == search(surface, 3)
    least = CHEAP * CHEAP_TRIALS if search is bench.from_cheap else 0
    assert least < cost < MOST


@pytest.mark.parametrize("name", list(bench.OPTUNA))
def test_optunas_own_studies_get_there_too(surface: Surface, name: str) -> None:
    assert 1 < bench.optuna_s(name, surface, 0) <= MOST


def test_what_is_recorded_is_read_back(surface: Surface, tmp_path: Path) -> None:
    raw = json.loads(bench.FILE.read_text())
    assert set(raw) == {"objectives", "space", "points"}
    raw["points"] = raw["points"][:3]
    (tmp_path / "few.json").write_text(json.dumps(raw))
    assert len(Surface.read(tmp_path / "few.json").whole) == 3
