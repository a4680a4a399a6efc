"""Attention within blocks on a GPU against plain maths in float64, and against the twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvlab.kernels import tokens as twin

CASES = [
    # blocks, heads, KV heads, rows, dim, value dim
    (1, 1, 1, 1, 32, 32),
    (7, 4, 1, 5, 32, 32),
    (33, 8, 1, 10, 64, 64),
    (3, 4, 4, 17, 80, 48),
    (5, 8, 2, 3, 96, 128),
    (2, 2, 1, 79, 128, 128),
    (2, 2, 2, 128, 256, 256),
]
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def exact(q: Tensor, k: Tensor, v: Tensor, held: Tensor | None) -> Tensor:
    """In float64; rows that are not held may hold anything."""
    group = q.shape[1] // k.shape[1]
    there = torch.ones(len(q), k.shape[2], dtype=torch.bool, device=q.device)
    if held is not None:
        there = torch.arange(k.shape[2], device=q.device) < held[:, None]
    there = there[:, None, None]
    k, v = (x.double().masked_fill(~there.mT, 0).repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~there, float("-inf")).softmax(-1).nan_to_num() @ v


def close(found: Tensor, expected: Tensor) -> None:
    error = ERRORS[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.usefixtures("seed")
def test_attention_in_blocks(
    device: torch.device, case: tuple[int, ...], dtype: torch.dtype
) -> None:
    from kvlab.kernels.gpu.tokens import attend_block

    count, heads, kv_heads, rows, dim, value_dim = case
    q = (2 * torch.randn(count, 1, heads, dim)).to(device, dtype).transpose(1, 2)
    k = torch.randn(count, kv_heads, rows, dim).to(device, dtype)
    v = torch.randn(count, kv_heads, rows, value_dim).to(device, dtype)
    held = torch.randint(0, rows + 1, (count,), device=device)
    empty = torch.arange(rows, device=device) >= held[:, None]
    poisoned = [x.masked_fill(empty[:, None, :, None], float("nan")) for x in (k, v)]
    for keys, values, many in ((k, v, None), (*poisoned, held), (*poisoned, held.int())):
        found = attend_block(q, keys, values, many)
        assert found.dtype == dtype
        expected = exact(q, keys, values, many)
        close(found, expected)
        close(twin.attend_block(*(x.cpu() for x in (q, keys, values)), *_cpu(many)), expected.cpu())


@pytest.mark.usefixtures("seed")
def test_rows_of_a_server_and_of_a_session(device: torch.device) -> None:
    """Views into storages: of all layers of requests, and of the rows held so far."""
    from kvlab.kernels.gpu.tokens import attend_block

    q = torch.randn(6, 4, 1, 32, device=device)
    kv = torch.randn(6, 3, 2, 2, 9, 32, device=device)
    held = torch.tensor([1, 9, 4, 0, 2, 7], device=device)
    found = attend_block(q, kv[:, 1, 0], kv[:, 1, 1], held)
    close(found, exact(q, kv[:, 1, 0], kv[:, 1, 1], held))
    assert not found[3].any()
    layer = torch.full((2, 6, 2, 9, 32), float("nan"), device=device)
    layer[:, :, :, :4] = torch.randn(2, 6, 2, 4, 32)
    k, v = layer[:, :, :, :4]
    close(attend_block(q, k, v), exact(q, k, v, None))


@pytest.mark.usefixtures("seed")
def test_large_scores_stay_finite(device: torch.device) -> None:
    from kvlab.kernels.gpu.tokens import attend_block

    q = torch.full((2, 1, 1, 32), 300.0, device=device)
    k = torch.cat((torch.full((2, 1, 1, 32), 300.0), torch.full((2, 1, 1, 32), -300.0)), 2)
    v = torch.randn(2, 1, 2, 32, device=device)
    found = attend_block(q, k.to(device), v)
    torch.testing.assert_close(found[:, :, 0], v[:, :, 0])


def test_every_number_of_the_answer_is_written(device: torch.device) -> None:
    from kvlab.kernels.gpu import tokens

    def poisoned(size: tuple[int, ...], **how: object) -> Tensor:
        return torch.full(size, float("nan"), **how)  # type: ignore[call-overload]

    x = torch.ones(5, 2, 1, 48, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens.torch, "empty", poisoned)
        found = tokens.attend_block(x, x, x)
    assert not found.isnan().any()


Q, K = torch.ones(3, 4, 1, 8), torch.ones(3, 2, 5, 8)
HELD = torch.ones(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("q", (K, K, K)),
        ("q", (Q.double(), K.double(), K.double())),
        ("k", (Q, K[:2], K)),
        ("k", (Q, torch.ones(3, 3, 5, 8), torch.ones(3, 3, 5, 8))),
        ("k", (Q, K.half(), K)),
        ("k", (Q, K.to("meta"), K)),
        ("k", (Q, K[..., :7], K)),
        ("k", (Q, K[:, :, :0], K[:, :, :0])),
        ("k", (Q, torch.ones(3, 2, 129, 8), torch.ones(3, 2, 129, 8))),
        ("k", (Q, K.mT.contiguous().mT, K)),
        ("v", (Q, K, K[:, :, :4])),
        ("v", (Q, K, torch.ones(3, 2, 5, 300))),
        ("held", (Q, K, K, HELD[:2])),
        ("held", (Q, K, K, HELD.float())),
        ("held", (Q, K, K, HELD.to("meta"))),
    ],
)
def test_what_does_not_go_together_is_refused(
    device: torch.device, name: str, given: tuple[Tensor, ...]
) -> None:
    from kvlab.kernels.gpu.tokens import attend_block

    for function in (attend_block, twin.attend_block):
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(*given)


def test_no_block_at_all(device: torch.device) -> None:
    from kvlab.kernels.gpu.tokens import attend_block

    none = torch.ones(0, 2, 1, 8, device=device)
    assert attend_block(none, none, none).shape == none.shape


def _cpu(held: Tensor | None) -> tuple[Tensor, ...]:
    return () if held is None else (held.cpu(),)
