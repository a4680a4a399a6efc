"""`attend` against attention written out, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, Rule, _attend_folded, attend

RULES = [Rule(), Rule(strict=True), Rule(window=3), Rule(window=3, sinks=2)]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, j: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """One query row and head at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    mass = torch.zeros(q.shape[0], q.shape[1], k.shape[2], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h // group
            for t in range(q.shape[2]):
                here, rows = int(p[b, t]), j[b] if j.dim() == 2 else j[b, kv]
                may = [
                    s for s, row in enumerate(rows.tolist())
                    if row != EMPTY and (row < here if rule.strict else row <= here)
                    and (rule.window is None or here - row < rule.window or row < rule.sinks)
                ]  # fmt: skip
                if may:
                    scores = k[b, kv, may] @ q[b, h, t] * q.shape[-1] ** -0.5
                    shares = scores.softmax(0)
                    out[b, h, t] = shares @ v[b, kv, may]
                    mass[b, h, may] += shares
    return out + 0 * (q.sum() + k.sum() + v.sum()), mass  # a gradient even where none is read


def operands(heads: int, kv_heads: int, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * 10 + keys)
    shapes = ((2, heads, rows, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 5))
    q, k, v = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes)
    return q, k, v


def scattered(keys: int, kv_heads: int | None) -> Tensor:
    """Positions in no order, a third of them empty."""
    shape = (2, keys) if kv_heads is None else (2, kv_heads, keys)
    places = torch.rand(shape).argsort(-1)
    return places.masked_fill(torch.rand(shape) < 0.3, EMPTY)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("per_head", [False, True])
def test_rows_in_any_order(
    rule: Rule, heads: int, kv_heads: int, rows: int, per_head: bool
) -> None:
    q, k, v = operands(heads, kv_heads, rows, 7)
    p = torch.randint(0, 7, (2, rows))
    p[1, 0] = EMPTY
    j = scattered(7, kv_heads if per_head else None)
    out, none = attend(q, k, v, p, j, rule)
    expected, mass = written_out(q, k, v, p, j, rule)
    assert none is None
    torch.testing.assert_close(out, expected)
    assert (out[1, :, 0] == 0).all()
    weighed, key_mass = attend(q, k, v, p, j, rule, mass_rows=slice(None))
    torch.testing.assert_close(weighed, expected, rtol=1e-5, atol=1e-6)
    assert key_mass is not None
    assert key_mass.dtype == torch.float32
    torch.testing.assert_close(key_mass.double(), mass, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(out)
    for ours in (out, weighed):
        for a, b in zip(
            torch.autograd.grad(ours, (q, k, v), g, retain_graph=True),
            torch.autograd.grad(expected, (q, k, v), g, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("mass_rows", [None, slice(None)], ids=str)
def test_packed_rows_need_no_positions(rule: Rule, mass_rows: slice | None) -> None:
    q, k, v = operands(4, 2, 6, 6)
    places = torch.arange(6).expand(2, 6)
    expected, mass = written_out(q, k, v, places, places, rule)
    out, key_mass = attend(q, k, v, None, None, rule, mass_rows)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    if key_mass is not None:
        torch.testing.assert_close(key_mass.double(), mass, rtol=1e-5, atol=1e-6)


def test_a_window_over_all_rows_is_plain_causal() -> None:
    q, k, v = operands(2, 2, 6, 6)
    torch.testing.assert_close(
        attend(q, k, v, None, None, Rule(window=6))[0], attend(q, k, v, None, None)[0]
    )


def test_without_key_positions_every_key_is_read() -> None:
    q, k, v = operands(4, 2, 1, 5)
    here, everywhere = torch.full((2, 1), 4), torch.arange(5).expand(2, 5)
    torch.testing.assert_close(attend(q, k, v, here, None)[0], attend(q, k, v, here, everywhere)[0])


def test_a_given_mask_is_the_one_used() -> None:
    q, k, v = operands(4, 2, 3, 5)
    p, j = torch.tensor([[2, 3, 4]]).expand(2, 3), torch.arange(5).expand(2, 5)
    mask = Rule(window=2).allows(p, j)
    torch.testing.assert_close(
        attend(q, k, v, p, j, Rule(window=1), mask=lambda: mask)[0],
        attend(q, k, v, p, j, Rule(window=2))[0],
    )


@pytest.mark.parametrize("rows", [slice(-2, None), slice(1, 3), slice(-1, None)], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_mass_of_some_queries(rows: slice, given: bool) -> None:
    q, k, v = operands(4, 2, 6, 6)
    places = torch.arange(6).expand(2, 6) if given else None
    out, mass = attend(q, k, v, places, places, mass_rows=rows)
    torch.testing.assert_close(out, attend(q, k, v, places, places)[0])
    each = [attend(q, k, v, None, None, mass_rows=slice(t, t + 1))[1] for t in range(6)[rows]]
    torch.testing.assert_close(mass, sum(each))
    everywhere = torch.arange(6).expand(2, 6)
    only = written_out(q[:, :, rows], k, v, everywhere[:, rows], everywhere, Rule())[1]
    assert mass is not None
    torch.testing.assert_close(mass.double(), only, rtol=1e-5, atol=1e-6)


def test_packed_queries_over_keys_in_any_order() -> None:
    q, k, v = operands(4, 2, 6, 6)
    order = torch.randperm(6)
    expected = attend(q, k, v, None, None)[0]
    for mass_rows in (None, slice(None), slice(-2, None)):
        found = attend(q, k[:, :, order], v[:, :, order], None, order[None], mass_rows=mass_rows)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_folded_groups_agree(rows: int, per_head: bool) -> None:
    """The way of CUDA, whose masks and groups do not go together."""
    q, k, v = operands(4, 2, rows, 7)
    p, j = torch.randint(4, 7, (2, rows)), scattered(7, 2 if per_head else None)
    mask = Rule(window=3).allows(p, j)
    torch.testing.assert_close(
        _attend_folded(q, k, v, mask), attend(q, k, v, p, j, Rule(window=3))[0]
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_low_precision_stays_close(rows: int) -> None:
    q, k, v = (t.detach() for t in operands(4, 2, rows, 7))
    p, j = torch.full((2, rows), 6), torch.arange(7).expand(2, 7)
    out, mass = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), p, j, mass_rows=slice(None))
    assert out.dtype == torch.bfloat16
    assert mass is not None
    assert mass.dtype == torch.float32
    torch.testing.assert_close(out.double(), attend(q, k, v, p, j)[0], rtol=0.05, atol=0.05)
