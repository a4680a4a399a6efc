"""The twin of ADORE's step against the controller that methods train."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from kvlab.kernels.adore import advance, score
from kvlab.kernels.select import best
from kvlab.methods.eviction.adore.controller import FARTHEST, Controller, buckets, edges
from kvlab.methods.eviction.adore.scores import ControllerScores, Fresh
from kvlab.methods.eviction.adore.sizes import ControllerConfig

CPU = torch.device("cpu")
Position = Literal["relative", "absolute", "none"]


@pytest.mark.parametrize("state", ["gru", "token"])
@pytest.mark.parametrize("position", ["relative", "absolute", "none"])
@pytest.mark.parametrize(("match", "layers"), [(0, 1), (4, 3)])
@torch.no_grad()
def test_steps_are_those_of_a_controller(
    state: Literal["gru", "token"], position: Position, match: int, layers: int
) -> None:
    batch, rows, width = 2, 60, 6
    config = ControllerConfig(
        10, width, state=state, hidden=8, position=position, match=match, layers=layers
    )
    controller = Controller(config)
    scores = ControllerScores(controller, batch, rows, CPU, torch.float32)
    cell, head = controller.packed()
    own_state, own_memory = scores.state.clone(), scores.memory.clone()
    for newest in range(40, 44):
        places = torch.tensor([newest, newest - 30])
        embedded = torch.randn(batch, 1, width)
        scores.see(Fresh(embedded, places[:, None], torch.ones(batch, dtype=torch.long)))
        came = controller.incoming(embedded[:, 0])
        query = advance(cell, came, own_state, own_memory, places)
        torch.testing.assert_close(own_state, scores.state)
        torch.testing.assert_close(own_memory, scores.memory)
        found = score(head, own_memory, query, places, 44)
        torch.testing.assert_close(found, scores.every(44, places[:, None]))
        some = torch.randint(0, 44, (batch, 7))
        found = score(head, own_memory, query, places, some)
        for layer in range(layers):
            expected = scores.of(layer, some, places[:, None])
            torch.testing.assert_close(found[layer], expected)


def test_buckets_begin_at_their_edges() -> None:
    places = torch.cat((torch.arange(-2, 5000), torch.randint(FARTHEST + 99, (5000,))))
    found = torch.bucketize(places, edges(), right=True)
    assert torch.equal(found, buckets(places))


def test_what_is_rebuilt_is_what_a_log_chooses() -> None:
    scores = torch.rand(3, 30).masked_fill(torch.rand(3, 30) < 0.7, float("-inf"))
    found = best(scores, 12, above=0.2)
    highest = scores.topk(12)
    chosen = torch.where(highest.values > 0.2, highest.indices, -1).sort(-1).values
    assert torch.equal(found.sort(-1).values, chosen)


def test_what_stays_is_what_a_table_chooses() -> None:
    """The tie rule and the order of `Table.choose`, for rows in the order of their positions."""
    from kvlab.methods.cache.table import Table
    from kvlab.methods.eviction.h2o.params import H2OParams
    from kvlab.methods.eviction.h2o.ranking import H2O

    budgets = torch.tensor([7, 3])
    table = Table(H2O(H2OParams()), [0], budgets, 8, heads=2, scored=True, device=CPU)
    positions = torch.arange(20).expand(2, 1, -1) - torch.tensor([0, 5])[:, None, None]
    positions = positions.clamp_min(-1)
    newest = torch.tensor([19, 14])[:, None, None]
    scores = torch.randint(4, (2, 2, 20)).float()
    chosen = table.choose(0, positions, scores, newest, None)
    ranks = table.ranks(positions, scores, newest, None, (0,))
    found = best(ranks, 7, budgets=budgets[:, None].expand(2, 2))
    assert torch.equal(found, chosen.index.masked_fill(~chosen.held, -1))
