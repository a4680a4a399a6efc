"""The twin of a decode step's eviction against what the caches' tables do."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.kernels.evict import Stays, evict, evict_and_write, write
from kvlab.methods.cache.ranking import Newest, Ranking
from kvlab.methods.cache.storage import PlainStorage, Space
from kvlab.methods.cache.table import Table
from kvlab.methods.eviction.adore.params import AdoreParams
from kvlab.methods.eviction.adore.ranking import Adore
from kvlab.methods.eviction.h2o.params import H2OParams
from kvlab.methods.eviction.h2o.ranking import H2O
from kvlab.methods.eviction.streaming_llm.params import StreamingParams
from kvlab.methods.eviction.streaming_llm.ranking import StreamingLLM

CPU = torch.device("cpu")
BATCH, HEADS, ROWS = 3, 2, 9


def table_of(ranking: Ranking, *, layers: int, scored: bool) -> Table:
    """Budgets of each sample, so that some slots of the others are shut."""
    budgets = torch.tensor([8, 5, 6])
    table = Table(ranking, range(layers), budgets, ROWS, heads=HEADS, scored=scored, device=CPU)
    length = 6
    for place in {table.place_of[layer] for layer in range(layers)}:
        for sample, budget in enumerate(budgets.tolist()):
            for head in range(table.positions.shape[2]):
                held = sorted(random.sample(range(length), min(budget - 1, 4)))
                table.positions[place, sample, head, : len(held)] = torch.tensor(held)
    if table.scores is not None:
        table.scores.copy_(torch.randint(4, table.scores.shape).float())
        table.scores.masked_fill_(table.positions == EMPTY, 0.0)
    return table


def stays_of(table: Table, **how: object) -> Stays:
    return Stays(usable=table.budgets + 1, **how)  # type: ignore[arg-type]


def steps(
    table: Table, stays: Stays, window: int | None, layers: int, known: Tensor | None
) -> None:
    """Take steps in the table, and the same with `evict` in a copy of it."""
    positions = table.positions.clone()
    scores = None if table.scores is None else table.scores.clone()
    for step in range(12):
        newest = torch.tensor([6, 6, 6]) + step
        table.begin()
        table.step(newest[:, None, None], window)
        found = evict(positions, newest, stays, scores=scores, known=known)
        assert torch.equal(found, table.slots)
        assert torch.equal(positions, table.positions)
        if scores is None or table.scores is None:
            continue
        assert torch.equal(scores, table.scores)
        grown = torch.randint(3, scores.shape).float() / 4
        scores += grown
        table.scores += grown


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("recent", [0.0, 0.5, 0.9])
def test_h2o(window: int | None, recent: float) -> None:
    random.seed(torch.manual_seed(random.randrange(2**31)).initial_seed())
    table = table_of(H2O(H2OParams(recent=recent)), layers=2, scored=True)
    kept = (table.budgets * recent + 0.5).floor().long()
    steps(table, stays_of(table, recent=kept, window=window), window, 2, None)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_streaming_llm(window: int | None, sinks: int) -> None:
    table = table_of(StreamingLLM(StreamingParams(sinks=sinks)), layers=2, scored=False)
    steps(table, stays_of(table, sinks=sinks, window=window), window, 2, None)


def test_the_newest() -> None:
    steps(table := table_of(Newest(None), layers=1, scored=False), stays_of(table), None, 1, None)


@pytest.mark.parametrize("layers", [1, 2])
def test_adore(layers: int) -> None:
    ranking = Adore(AdoreParams(recent=2, per="model" if layers == 1 else "layer"))
    known = torch.randint(4, (layers, BATCH, 40)).float()
    ranking.current = ({i: i for i in range(layers)}, known)
    table = table_of(ranking, layers=layers, scored=False)
    recent = torch.full((BATCH,), 2)
    steps(table, stays_of(table, recent=recent), None, layers, known)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_go_where_a_storage_puts_them(apart: bool, kv_heads: int) -> None:
    heads, dim = 4, 8
    space = Space(BATCH, heads, ROWS, dim, CPU, torch.float32)
    storage, own = PlainStorage(None, space), PlainStorage(None, space)
    positions = torch.full((BATCH, heads if apart else 1, ROWS), EMPTY)
    positions[..., :4] = torch.rand(*positions.shape[:-1], 4).argsort(-1)
    k, v = torch.randn(2, BATCH, kv_heads, 1, dim)
    newest = torch.full((BATCH,), 10)
    slots = evict_and_write(
        own.k, own.v, k, v, positions, newest, Stays(usable=torch.full((BATCH,), 4))
    )
    storage.put(slots, *(x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)))
    assert torch.equal(own.k, storage.k)
    assert torch.equal(own.v, storage.v)
    assert bool((positions.gather(2, slots) == 10).all())
    again = PlainStorage(None, space)
    write(again.k, again.v, k, v, slots)
    assert torch.equal(again.k, own.k)


def test_scores_grow_by_the_mass_of_a_heads_queries_first() -> None:
    ranking = H2O(H2OParams())
    scores, mass = torch.rand(BATCH, HEADS, ROWS), torch.rand(BATCH, 6, ROWS - 2)
    expected = scores.clone()
    expected[..., : ROWS - 2] += ranking.tally(mass, HEADS)
    positions = torch.arange(ROWS).expand(BATCH, HEADS, -1).clone()
    slots = evict(positions, torch.full((BATCH,), ROWS), Stays(), scores=scores, mass=mass)
    assert torch.equal(slots, expected.argmin(-1, keepdim=True))
    assert torch.equal(scores, expected.scatter(-1, slots, 0.0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scored", [False, True])
def test_windows_of_each_layer(scored: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    windows = torch.tensor([3, 2**31 - 1, 7, 1])
    shape = (len(windows), BATCH, HEADS, ROWS)
    for newest in (9, 12, 40):
        held = torch.rand(shape, generator=generator).argsort(-1)
        ranks = torch.rand(shape, generator=generator) if scored else held
        scores = ranks.clone() if scored else None
        positions = held.to(dtype, copy=True)
        stays = Stays(torch.tensor([1, 2, 8]), 2, windows.to(dtype))
        slots = evict(positions, torch.full((BATCH,), newest), stays, scores=scores)
        for layer, sample, head in itertools.product(*map(range, shape[:3])):
            here = held[layer, sample, head].tolist()
            own = ranks[layer, sample, head].tolist()
            window, recent = int(windows[layer]), [1, 2, 8][sample]
            gone = [slot for slot, at in enumerate(here) if at <= newest - window]
            free = [s for s, at in enumerate(here) if at >= 2 and at < newest - recent]
            wanted = gone[0] if gone else min(free, key=lambda slot: own[slot], default=0)
            assert slots[layer, sample, head].item() == wanted
            assert positions[layer, sample, head, wanted] == newest


POSITIONS = torch.zeros(2, 2, 5, dtype=torch.long)
NEWEST = torch.ones(2, dtype=torch.long)
SCORES = torch.zeros(2, 2, 5)
DEEP = POSITIONS.expand(3, -1, -1, -1)
LAYERS = torch.ones(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("positions", {"positions": SCORES}),
        ("positions", {"positions": POSITIONS[0]}),
        ("positions", {"positions": POSITIONS[..., :0]}),
        ("newest", {"newest": NEWEST[:1]}),
        ("newest", {"newest": NEWEST.float()}),
        ("stays.recent", {"stays": Stays(recent=NEWEST[:1])}),
        ("stays.usable", {"stays": Stays(usable=NEWEST.float())}),
        ("stays.window", {"stays": Stays(window=0)}),
        ("stays.window", {"stays": Stays(window=NEWEST)}),
        ("stays.window", {"positions": DEEP, "stays": Stays(window=NEWEST)}),
        ("stays.window", {"positions": DEEP, "stays": Stays(window=torch.ones(3))}),
        ("stays.window", {"positions": DEEP, "stays": Stays(window=torch.tensor(3))}),
        ("stays.window", {"positions": DEEP, "stays": Stays(window=LAYERS.to("meta"))}),
        ("scores", {"scores": SCORES[..., :4]}),
        ("scores", {"scores": SCORES.double()}),
        ("scores", {"scores": SCORES.to("meta")}),
        ("known", {"known": torch.zeros(2, 2, 8)}),
        ("known", {"known": torch.zeros(2, 8), "scores": SCORES}),
        ("mass", {"mass": torch.zeros(2, 4, 5)}),
        ("mass", {"mass": torch.zeros(2, 3, 5), "scores": SCORES}),
        ("mass", {"mass": torch.zeros(2, 4, 6), "scores": SCORES}),
        ("mass", {"mass": torch.zeros(2, 4), "scores": SCORES}),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, given: dict[str, object]) -> None:
    known = {"positions": POSITIONS, "newest": NEWEST, "stays": Stays(), **given}
    with pytest.raises(ValueError, match=f"^{name}: "):
        evict(**known)


CACHE = torch.zeros(2, 4, 5, 8)
ROW = torch.zeros(2, 2, 1, 8)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("k", (CACHE, CACHE, ROW[:, 0], ROW)),
        ("k", (CACHE, CACHE, torch.zeros(2, 3, 1, 8), ROW)),
        ("k", (CACHE, CACHE, torch.zeros(2, 2, 2, 8), ROW)),
        ("k", (CACHE, CACHE, ROW.half(), ROW)),
        ("v", (CACHE, CACHE, ROW, ROW[..., :7])),
        ("cache_v", (CACHE, CACHE[:, :, :4], ROW, ROW)),
        ("positions or slots", (CACHE[:, :3], CACHE[:, :3], ROW[:, :1], ROW[:, :1])),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, rows: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        evict_and_write(*rows, POSITIONS, NEWEST, Stays())  # type: ignore[call-arg]
