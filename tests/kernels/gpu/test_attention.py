"""The attention kernels against attention written out in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvlab.kernels import attention
from kvlab.kernels.attention import EMPTY, Rule
from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.stored import Stored

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

RULES = [Rule(), Rule(strict=True), Rule(window=9), Rule(window=9, sinks=4), Rule(True, 1, 70)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Case(NamedTuple):
    """heads: of queries, of keys. rows: T, S. width: D, D_v. parts: None: the device's own."""

    heads: tuple[int, int]
    rows: tuple[int, int]
    width: tuple[int, int]
    dtype: torch.dtype = torch.float32
    parts: int | None = None
    batch: int = 2


CASES = [
    Case((4, 4), (1, 70), (32, 32)),
    Case((4, 1), (1, 131), (64, 64), torch.bfloat16),
    Case((8, 1), (1, 260), (128, 128), torch.float16, parts=3),
    Case((8, 8), (1, 33), (96, 80), torch.bfloat16, parts=7),
    Case((6, 2), (5, 45), (40, 24), parts=2),
    Case((4, 2), (3, 17), (256, 256), torch.bfloat16),
    Case((2, 1), (2, 20), (256, 256)),
    Case((2, 2), (70, 40), (16, 8), torch.float16),
    Case((5, 1), (33, 50), (64, 64)),
    Case((48, 1), (1, 40), (128, 128), parts=2, batch=1),
    Case((71, 1), (1, 20), (32, 32), torch.bfloat16, batch=1),
    Case((8, 2), (130, 150), (128, 128), torch.bfloat16, batch=1),
]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture
def fused(device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch) -> Attend:
    """The kernels; what they do not write is NaN."""
    from kvlab.kernels.gpu.attention import attend

    plain = Tensor.new_empty

    def poisoned(x: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
        made = plain(x, *shape, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    return attend


def written_out(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, seen: slice
) -> tuple[Tensor, Tensor]:
    """In float64, with `allowed` [B or 1, H_kv or 1, T or 1, S]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    allowed = allowed.cpu().expand(len(q), -1, q.shape[2], -1)
    if allowed.shape[1] > 1:
        allowed = allowed.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    shares = scores.softmax(-1).nan_to_num(0.0)
    return shares @ v, shares[:, :, seen].sum(2)


def operands(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; keys and values have rows behind their last and columns between."""
    (heads, kv_heads), (rows, keys), (dim, width) = case.heads, case.rows, case.width
    q = torch.randn(case.batch, rows, heads, dim, device=device).transpose(1, 2)
    k = torch.randn(case.batch, kv_heads, keys + 3, dim + 1, device=device)[:, :, :keys, :dim]
    v = torch.randn(case.batch, kv_heads, keys + 3, width, device=device)[:, :, :keys]
    return q.to(case.dtype), k.to(case.dtype), v.to(case.dtype)


def scattered(case: Case, device: torch.device, per_head: bool) -> Tensor:
    """Positions of keys in no order, a third of them empty."""
    lead = (case.batch, case.heads[1]) if per_head else (case.batch,)
    places = torch.rand(*lead, case.rows[1]).argsort(-1)
    return places.masked_fill(torch.rand(places.shape) < 0.3, EMPTY).to(device)


def check(
    found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor], looser: float = 1
) -> None:
    out, mass = found
    close = TOLERANCE[out.dtype] * looser
    torch.testing.assert_close(out.double().cpu(), expected[0], rtol=close, atol=close)
    assert mass is not None
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double().cpu(), expected[1], rtol=1e-4 * looser, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_in_any_order(
    fused: Attend, device: torch.device, case: Case, rule: Rule, seed: int
) -> None:
    if device.type == "cpu" and (CASES.index(case) + RULES.index(rule)) % 3:
        pytest.skip("the full set is for a GPU")
    q, k, v = operands(case, device)
    per_head = seed % 2 == 0
    j = scattered(case, device, per_head)
    p = torch.randint(0, case.rows[1], (case.batch, case.rows[0]), device=device)
    p[-1, 0] = EMPTY
    empty = (j if per_head else j.unsqueeze(1)).unsqueeze(-1) == EMPTY
    seen = random.choice([slice(None), slice(-2, None), slice(0, 1)])
    expected = written_out(q, k, v, rule.allows(p, j), seen)
    nothing = k.new_full((), torch.nan)
    found = fused(
        q, torch.where(empty, nothing, k), torch.where(empty, nothing, v), p, j, rule, seen,
        parts=case.parts,
    )  # fmt: skip
    check(found, expected)
    assert (found[0][-1, :, 0] == 0).all()
    assert fused(q, k, v, p, j, rule, parts=case.parts)[1] is None


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_rows(fused: Attend, device: torch.device, rule: Rule, dtype: torch.dtype) -> None:
    case = Case((4, 2), (random.randint(90, 150),) * 2, (64, 64), dtype, batch=1)
    q, k, v = operands(case, device)
    places = torch.arange(case.rows[0]).unsqueeze(0)
    for seen in (slice(None), slice(-5, None), slice(17, 60)):
        expected = written_out(q, k, v, rule.allows(places, places), seen)
        check(fused(q, k, v, None, None, rule, seen), expected)


def test_packed_queries_over_keys_in_any_order(fused: Attend, device: torch.device) -> None:
    case = Case((4, 2), (50, 60), (32, 32))
    q, k, v = operands(case, device)
    j = scattered(case, device, per_head=False)[:1]
    allowed = Rule().allows(torch.arange(50).unsqueeze(0), j.cpu())
    found = fused(q, k, v, None, j, Rule(), slice(None))
    check(found, written_out(q, k, v, allowed, slice(None)))


@pytest.mark.parametrize("parts", [1, 4])
def test_without_key_positions_every_key_is_read(
    fused: Attend, device: torch.device, parts: int
) -> None:
    case = Case((4, 2), (2, 150), (32, 32))
    q, k, v = operands(case, device)
    here = torch.zeros(2, 2, dtype=torch.long, device=device)
    found = fused(q, k, v, here, None, Rule(), slice(None), parts=parts)
    check(found, written_out(q, k, v, torch.ones(1, 1, 1, 150, dtype=torch.bool), slice(None)))


@pytest.mark.parametrize("parts", [1, 5])
def test_nothing_to_read_is_zero(fused: Attend, device: torch.device, parts: int) -> None:
    case = Case((4, 2), (3, 150), (32, 32), torch.bfloat16)
    q, k, v = operands(case, device)
    p = torch.full((2, 3), 3, device=device)
    for keys, j in ((150, torch.full((2, 150), EMPTY)), (150, torch.full((2, 150), 7)), (0, None)):
        j = torch.zeros(2, 0, dtype=torch.long) if j is None else j
        found = fused(q, k[:, :, :keys], v[:, :, :keys], p, j.to(device), Rule(), slice(None),
                      parts=parts)  # fmt: skip
        check(found, (torch.zeros(2, 4, 3, 32).double(), torch.zeros(2, 4, keys).double()))


def test_large_scores_neither_overflow_nor_vanish(fused: Attend, device: torch.device) -> None:
    case = Case((2, 1), (2, 90), (64, 64))
    q, k, v = operands(case, device)
    p = torch.tensor([[89, 40]], device=device)
    j = torch.arange(90, device=device).unsqueeze(0)
    for factor in (300.0, -300.0):
        expected = written_out(q * factor, k, v, Rule().allows(p, j), slice(None))
        check(fused(q * factor, k, v, p, j, Rule(), slice(None), parts=2), expected, 100)


def test_the_mass_is_the_same_every_time(fused: Attend, device: torch.device) -> None:
    q, k, v = operands(Case((8, 2), (90, 90), (64, 64), torch.bfloat16), device)
    first, second = (fused(q, k, v, None, None, Rule(), slice(None))[1] for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


REFUSED: list[tuple[str, str, Callable[[dict[str, Any]], None]]] = [
    ("q: must be float32", "float64", lambda g: g.update(q=g["q"].double())),
    ("k, v: must be", "two dtypes", lambda g: g.update(v=g["v"].half())),
    ("k: 3 heads", "groups", lambda g: g.update(k=torch.zeros(2, 3, 9, 16))),
    ("k: must be", "head size", lambda g: g.update(k=g["k"][..., :8])),
    ("v: must be", "rows", lambda g: g.update(v=g["v"][:, :, :8])),
    ("q, v: heads", "width", lambda g: g.update(q=torch.zeros(2, 4, 1, 300))),
    ("q_positions: must be", "rows", lambda g: g.update(q_positions=torch.zeros(2, 2).long())),
    ("k_positions: must be", "heads", lambda g: g.update(k_positions=torch.zeros(2, 4, 9).long())),
    ("k_positions: must be int", "dtype", lambda g: g.update(k_positions=torch.zeros(2, 9))),
    ("k: rows without", "packed", lambda g: g.update(q_positions=None, k_positions=None)),
    ("mass_rows", "step", lambda g: g.update(mass_rows=slice(None, None, -1))),
]


@pytest.mark.parametrize(
    ("message", "change"), [(m, c) for m, _, c in REFUSED], ids=[f"{m} {n}" for m, n, _ in REFUSED]
)
def test_what_does_not_fit_is_refused(
    fused: Attend, message: str, change: Callable[[dict[str, Any]], None]
) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 4, 1, 16), "k": torch.zeros(2, 2, 9, 16), "v": torch.zeros(2, 2, 9, 16),
        "q_positions": torch.zeros(2, 1).long(), "k_positions": torch.zeros(2, 9).long(),
        "mass_rows": slice(None),
    }  # fmt: skip
    fused(**given)
    change(given)
    with pytest.raises(ValueError, match=f"^{message}"):
        fused(**given)


class Elsewhere(Tensor):
    """It says that it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_of_a_padded_prompt(device: torch.device, fused: Attend, rule: Rule) -> None:
    """One tensor of positions for queries and keys: what stands behind a row is not looked at."""
    case = Case((4, 2), (200, 200), (32, 32))
    q, k, v = operands(case, device)
    padding = torch.tensor([[0], [90]])
    p = (torch.arange(200) - padding).clamp_min(EMPTY).to(device)
    seen = slice(120, None)
    expected = written_out(q, k, v, rule.allows(p, p), seen)
    check(fused(q, k, v, p, p, rule, seen), expected)
    out, _ = fused(
        q, k, v.index_fill(2, torch.arange(192, 200, device=device), torch.nan), p, p, rule
    )
    assert torch.equal(out[:, :, :64].cpu().isnan(), torch.zeros_like(out[:, :, :64].cpu()).bool())


def test_the_seam_takes_what_the_kernels_can(device: torch.device, seed: int) -> None:
    q = torch.zeros(2, 4, 3, 16)
    there, codes = q.as_subclass(Elsewhere), q.to(torch.int8)
    assert attention._fusible(there, q, q, None, False)
    assert attention._fusible(there, codes, codes, Stored(), False)
    few = Stored(few=FewBits(4, *[Groups(codes, q, q, codes)] * 2))
    assert attention._fusible(there, q, q, few, False)
    assert not attention._fusible(there, codes, codes, few, False)
    assert not attention._fusible(there, q, q.repeat(1, 1, 1, 17), None, False)
    assert not attention._fusible(there, codes, codes, None, False)
    assert not attention._fusible(q, q, q, None, False)
    assert not attention._fusible(there, q, q, None, True)
    assert not attention._fusible(there, q, q.half(), None, False)
    assert not attention._fusible(there, q, q.half(), Stored(), False)
    assert not attention._fusible(there.double(), q.double(), q.double(), None, False)
    assert not attention._fusible(there, q.clone().requires_grad_(), q, None, False)
    with torch.no_grad():
        assert attention._fusible(there, q.clone().requires_grad_(), q, None, False)


@pytest.mark.parametrize("mass_rows", [None, slice(-2, None)], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_the_seam_hands_over(
    fused: Attend,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    mass_rows: slice | None,
    rows: int,
) -> None:
    case = Case((4, 2), (rows, 30), (32, 32))
    q, k, v = operands(case, device)
    p, j = torch.full((2, rows), 20, device=device), scattered(case, device, per_head=True)
    rule = Rule(window=7, sinks=3)
    expected = written_out(q, k, v, rule.allows(p, j), mass_rows or slice(None))
    monkeypatch.setattr(attention, "_fusible", lambda *_: True)
    monkeypatch.setattr(attention, "_attend", None)
    monkeypatch.setattr(attention, "_attend_seen", None)
    out, mass = attention.attend(q, k, v, p, j, rule, mass_rows)
    assert (mass is None) == (mass_rows is None)
    check((out, expected[1].float() if mass is None else mass), expected)
