"""The step of ADORE's controller on a GPU against its twin in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvlab.kernels import adore as twin
from kvlab.kernels.adore import Cell, Head

EDGES = torch.tensor([1, 2, 3, 5, 9, 17, 33])


def made(
    h: int, m: int, layers: int, *, gated: bool, places: bool, relative: bool
) -> tuple[Cell, Head]:
    def weight(*shape: int) -> Tensor:
        return torch.randn(shape) * h**-0.5

    hidden = (weight(3 * h, h), weight(3 * h)) if gated else (None, None)
    cell = Cell(
        *hidden, weight(h, h), weight(h), weight(m, h), weight(m),
        weight(layers * m, h), weight(layers * m),
    )  # fmt: skip
    buckets = (weight(8, h), EDGES) if places else (None, None)
    return cell, Head(weight(layers, h), weight(layers), *buckets, relative)


def moved(weights: Cell | Head, device: torch.device) -> Cell | Head:
    def move(x: object) -> object:
        return x.to(device) if isinstance(x, Tensor) else x

    return type(weights)(*(move(part) for part in weights))


@pytest.mark.parametrize(
    ("h", "m", "layers", "batch"), [(8, 4, 1, 1), (64, 32, 1, 3), (20, 0, 2, 2), (33, 70, 3, 2)]
)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("seed")
def test_a_step(
    device: torch.device, h: int, m: int, layers: int, batch: int, gated: bool, dtype: torch.dtype
) -> None:
    from kvlab.kernels.gpu.adore import advance, score

    cell, head = made(h, m, layers, gated=gated, places=batch > 1, relative=batch > 2)
    came = 3 * torch.randn(batch, (3 if gated else 1) * h)
    state, memory = torch.randn(batch, h), torch.randn(batch, 90, h + m).to(dtype)
    memory[:, 85:] = float("nan")
    newest = torch.randint(0, 80, (batch,))
    on_gpu = [x.clone().to(device) for x in (came, state, memory, newest)]
    query = advance(moved(cell, device), *on_gpu)
    expected = twin.advance(cell, came, state, memory, newest)
    close = torch.testing.assert_close
    close(query.cpu(), expected, rtol=1e-5, atol=1e-5)
    close(on_gpu[1].cpu(), state, rtol=1e-5, atol=1e-5)
    close(
        on_gpu[2].cpu(),
        memory,
        rtol=2e-3,
        atol=1e-3 if dtype.itemsize == 2 else 1e-5,
        equal_nan=True,
    )
    some = torch.randint(0, 85, (batch, 19))
    for positions in (85, 1, some, some[:, :1]):
        wanted = twin.score(head, memory, expected, newest, positions)
        on_device = positions if isinstance(positions, int) else positions.to(device)
        found = score(
            moved(head, device),
            memory.to(device),
            expected.to(device),
            newest.to(device),
            on_device,
        )
        close(found.cpu(), wanted, rtol=1e-5, atol=2e-5)


def test_saturated_gates(device: torch.device) -> None:
    from kvlab.kernels.gpu.adore import advance

    cell, _ = made(4, 2, 1, gated=True, places=False, relative=False)
    state, memory, newest = torch.ones(2, 4), torch.zeros(2, 3, 6), torch.tensor([0, 2])
    came = torch.tensor([[200.0] * 12, [-200.0] * 12])
    on_gpu = [x.clone().to(device) for x in (came, state, memory, newest)]
    advance(moved(cell, device), *on_gpu)
    twin.advance(cell, came, state, memory, newest)
    torch.testing.assert_close(on_gpu[1].cpu(), state)
    torch.testing.assert_close(on_gpu[2].cpu(), memory)


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    from kvlab.kernels.gpu import adore as gpu

    cell, head = made(4, 2, 3, gated=True, places=True, relative=True)
    came, state, memory = torch.ones(2, 12), torch.ones(2, 4), torch.ones(2, 9, 6)
    newest, query = torch.ones(2, dtype=torch.long), torch.ones(2, 6)
    for module in (gpu, twin):
        for name, given in (
            ("state", (cell, came, state[0], memory, newest)),
            ("came", (cell, came[:, :4], state, memory, newest)),
            ("memory", (cell, came, state, memory[..., :5], newest)),
            ("memory", (cell, came, state, memory.double(), newest)),
            ("newest", (cell, came, state, memory, newest.float())),
            ("cell.inner", (cell._replace(inner=cell.inner.T), came, state, memory, newest)),
            ("cell.query", (cell._replace(query=cell.query[:5]), came, state, memory, newest)),
            ("cell.hidden_bias", (cell._replace(hidden_bias=None), came, state, memory, newest)),
        ):
            with pytest.raises(ValueError, match=f"^{name}"):
                module.advance(*given)
        for name, asked in (
            ("head.edges", (head._replace(edges=None), memory, query, newest, 3)),
            ("head.edges", (head._replace(edges=EDGES[1:]), memory, query, newest, 3)),
            ("head.places", (head._replace(places=torch.ones(7, 4)), memory, query, newest, 3)),
            ("head.bias", (head._replace(bias=head.bias[:2]), memory, query, newest, 3)),
            ("query", (head, memory, query[:, :5], newest, 3)),
            ("positions", (head, memory, query, newest, 10)),
            ("positions", (head, memory, query, newest, torch.ones(2, 3))),
        ):
            with pytest.raises(ValueError, match=f"^{name}: "):
                module.score(*asked)
