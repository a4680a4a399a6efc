"""KIVI's storage against plain loops: what is quantised when, and what is shown in every slot."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.cache.storage import Space
from kvlab.methods.precision.kivi.params import KiviParams
from kvlab.methods.precision.kivi.storage import Kivi

HEADS = 2
CPU = torch.device("cpu")


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A group as it comes back, and its minimum."""
    low, high = x.min(), x.max()
    scale = (high - low) / (2**bits - 1)
    codes = [0.0 if scale == 0 else round(min(max(float((n - low) / scale), 0), 2**bits - 1))
             for n in x]  # fmt: skip
    return torch.tensor(codes) * scale + low, low


@dataclass
class Slow:
    """One head of one sample: the definition, row by row."""

    params: KiviParams
    capacity: int
    head_dim: int
    key_groups: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    lows: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    waiting_keys: list[tuple[int | None, Tensor]] = field(default_factory=list)
    waiting_values: list[tuple[int | None, Tensor]] = field(default_factory=list)

    def add(self, slot: int, k: Tensor, v: Tensor) -> None:
        """Take a row; slot -1: another head wanted it."""
        residual = self.params.recent(self.capacity)
        if len(self.waiting_keys) == residual:
            self.quantise_keys()
        if len(self.waiting_values) == residual + 1:
            self.quantise_value(*self.waiting_values.pop(0))
        target = None if slot < 0 else slot
        for waiting, row in ((self.waiting_keys, k), (self.waiting_values, v)):
            waiting[:] = [(None if target is not None and s == target else s, r)
                          for s, r in waiting]  # fmt: skip
            waiting.append((target, row))

    def quantise_keys(self) -> None:
        changed: dict[int, dict[int, Tensor]] = {}
        for slot, row in self.waiting_keys:
            if slot is not None:
                changed.setdefault(slot // self.params.group, {})[slot] = row
        for group, rows in changed.items():
            rows = self.key_groups.get(group, {}) | rows
            slots = sorted(rows)
            table = torch.stack([rows[slot] for slot in slots])
            found = [rounded(channel, self.params.bits) for channel in table.unbind(1)]
            columns, low = [x for x, _ in found], torch.stack([low for _, low in found])
            back = torch.stack(columns, dim=1)
            inside = range(group * self.params.group, (group + 1) * self.params.group)
            self.key_groups[group] = {s: low for s in inside if s < self.capacity} | dict(
                zip(slots, back, strict=True)
            )
        self.waiting_keys.clear()

    def quantise_value(self, slot: int | None, row: Tensor) -> None:
        if slot is not None:
            width = min(self.params.group, self.head_dim)
            self.values[slot] = torch.cat(
                [rounded(part, self.params.bits)[0] for part in row.split(width)]
            )

    def shown(self) -> tuple[Tensor, Tensor]:
        keys = {s: row for rows in self.key_groups.values() for s, row in rows.items()}
        keys |= {slot: row for slot, row in self.waiting_keys if slot is not None}
        values = self.values | {s: row for s, row in self.waiting_values if s is not None}
        nothing = torch.zeros(self.head_dim)
        k, v = (
            torch.stack([rows.get(slot, nothing) for slot in range(self.capacity)])
            for rows in (keys, values)
        )
        return k, v


@st.composite
def stories(draw: st.DrawFn) -> tuple[KiviParams, int, int, list[int], list[list[list[int]]]]:
    """Params, head size, capacity, prompt rows by sample, and turns: slots [heads][n] by sample."""
    group = 8
    params = KiviParams(draw(st.sampled_from([2, 4])), group, draw(st.sampled_from([8, 16])))
    head_dim = draw(st.sampled_from([4, 8, 16]))
    capacity = draw(st.integers(3, 40))
    counts = draw(st.lists(st.integers(0, capacity), min_size=1, max_size=3))
    slot = st.integers(0, capacity - 1)
    turns = []
    for _ in range(draw(st.integers(0, 30))):
        width = draw(st.sampled_from([1, 1, 1, 1, 2, 9, 40]))
        one = slot if width == 1 else st.one_of(slot, st.just(-1))
        shared = draw(st.booleans())
        heads = 1 if shared else HEADS
        turns.append(draw(st.lists(
            st.lists(st.lists(one, min_size=width, max_size=width), min_size=heads, max_size=heads),
            min_size=len(counts), max_size=len(counts),
        )))  # fmt: skip
    return params, head_dim, capacity, counts, turns


@settings(deadline=None, max_examples=25)
@given(stories(), st.integers(0, 2**31))
def test_every_slot_shows_what_plain_loops_say(
    story: tuple[KiviParams, int, int, list[int], list[list[list[int]]]], seed: int
) -> None:
    """And a batch stores, bit for bit, what its samples store alone and row by row."""
    params, head_dim, capacity, counts, turns = story
    random = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        shape = (len(counts), HEADS, n, head_dim)
        return torch.randn(shape, generator=random) * 3 + 1

    space = Space(len(counts), HEADS, capacity, head_dim, CPU, torch.float32)
    together = Kivi(params, space)
    alone = [Kivi(params, space._replace(batch=1)) for _ in counts]
    slow = [[Slow(params, capacity, head_dim) for _ in range(HEADS)] for _ in counts]
    longest = max(counts)
    k, v = rows(longest), rows(longest)
    together.fill(k, v, torch.tensor(counts))
    given_rows = [(k, v, torch.arange(longest).expand(len(counts), HEADS, longest), counts)]
    for turn in turns:
        slots = torch.tensor(turn)
        k, v = rows(slots.shape[-1]), rows(slots.shape[-1])
        together.put(slots, k, v)
        given_rows.append((k, v, slots.expand(-1, HEADS, -1), [slots.shape[-1]] * len(counts)))
    for k, v, slots, real in given_rows:
        for sample, count in enumerate(real):
            for row in range(count):
                own = slots[sample, :, row]
                if not bool((own >= 0).any()):
                    continue
                for head in range(HEADS):
                    found = (x[sample, head, row] for x in (k, v))
                    slow[sample][head].add(int(own[head]), *found)
                one = (x[sample : sample + 1, :, row : row + 1] for x in (k, v))
                put_one(alone[sample], own, *one)
    found_k, found_v = together.get(capacity)
    for sample, heads in enumerate(slow):
        for head, plain in enumerate(heads):
            expected_k, expected_v = plain.shown()
            torch.testing.assert_close(found_k[sample, head], expected_k, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found_v[sample, head], expected_v, atol=1e-5, rtol=1e-5)
        for name, part in alone[sample].state().items():
            assert torch.equal(together.state()[name][sample : sample + 1], part), name
    for fewer in (1, capacity // 2, capacity):
        for part, found in zip(together.get(fewer), (found_k, found_v), strict=True):
            assert torch.equal(part, found[:, :, :fewer])


def put_one(storage: Kivi, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put a row into slots [heads]; where a head does not want it, beside one that nobody wants."""
    slots = slots[None, :, None]
    if bool((slots < 0).any()):
        nobody = torch.full_like(slots, -1)
        slots = torch.cat((slots, nobody), dim=-1)
        k, v = torch.cat((k, k), dim=2), torch.cat((v, v), dim=2)
    storage.put(slots, k, v)


@pytest.mark.parametrize("count", [1, 8, 15, 16, 17, 32, 33, 40])
@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, (7, 1, 1, 3, 28), (16, 16, 8)])
def test_any_way_of_coming_stores_the_same(count: int, chunks: tuple[int, ...]) -> None:
    space = Space(1, HEADS, 41, 16, CPU, torch.float32)
    filled, pieces = Kivi(KiviParams(2, 8, 16), space), Kivi(KiviParams(2, 8, 16), space)
    k, v = torch.randn(2, 1, HEADS, 40, 16, generator=torch.Generator().manual_seed(0))
    filled.fill(k, v, torch.tensor([count]))
    begun = 0
    for chunk in chunks:
        rows = slice(begun, min(begun + chunk, count))
        if rows.start < rows.stop:
            pieces.put(rows, k[:, :, rows], v[:, :, rows])
        begun += chunk
    for name, part in pieces.state().items():
        assert torch.equal(filled.state()[name], part), name


@pytest.mark.parametrize("shared", [True, False])
def test_untouched_groups_stay_bit_for_bit(shared: bool) -> None:
    params = KiviParams(2, 8, 8)
    storage = Kivi(params, Space(1, HEADS, 64, 16, CPU, torch.float32))
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, HEADS, 64, 16, generator=random) for _ in range(2))
    storage.fill(k, v, torch.tensor([64]))
    first = torch.zeros(1, 1, 1, dtype=torch.long)
    storage.put(first, k[:, :, :1], v[:, :, :1])  # the last eight are quantised
    before = {name: part.clone() for name, part in storage.state().items()}
    width = 1 if shared else HEADS
    for slot in (17, 18, 40, 17, 23, 0, 1, 2, 3):  # groups 0, 2 and 5
        new = torch.randn(1, HEADS, 1, 16, generator=random)
        storage.put(torch.full((1, width, 1), slot), new, new)
    after = storage.state()
    for group in range(8):
        for name in ("key_codes", "key_scale", "key_low"):
            same = torch.equal(after[name][:, :, group], before[name][:, :, group])
            assert same == (group not in (0, 2, 5)), (name, group)


def test_a_saved_storage_goes_on_as_it_would_have() -> None:
    params = KiviParams(4, 8, 16)
    space = Space(2, HEADS, 33, 8, CPU, torch.float32)
    storage, other = Kivi(params, space), Kivi(params, space)
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2, HEADS, 60, 8, generator=random)
    storage.fill(rows[:, :, :20], rows[:, :, :20], torch.tensor([20, 11]))
    for name, part in other.state().items():
        part.copy_(storage.state()[name])
    for row in range(20, 60):
        slots = torch.tensor([row % 33, (row * 7) % 33])[:, None, None]
        for one in (storage, other):
            one.put(slots, rows[:, :, row : row + 1], rows[:, :, row : row + 1])
    for name, part in other.state().items():
        assert torch.equal(part, storage.state()[name]), name


def test_nothing_is_quantised_where_the_residual_holds_all() -> None:
    """As in the reference: a text shorter than the residual is read as it is."""
    storage = Kivi(KiviParams(), Space(1, 1, 40, 32, CPU, torch.float32))
    k, v = torch.randn(2, 1, 1, 40, 32).unbind(0)
    storage.fill(k[:, :, :30], v[:, :, :30], torch.tensor([30]))
    for row in range(30, 40):
        storage.put(slice(row, row + 1), k[:, :, row : row + 1], v[:, :, row : row + 1])
    assert torch.equal(storage.get(40)[0], k)
    assert torch.equal(storage.get(40)[1], v)


@pytest.mark.parametrize(
    ("params", "head_dim", "problem"),
    [
        (KiviParams(group=12, residual=24), 12, "group: must be a multiple of 8"),
        (KiviParams(group=32, residual=48), 32, "residual: must be a multiple of group"),
        (KiviParams(group=32), 80, r"group: must divide the head size \(80\)"),
    ],
)
def test_what_is_refused(params: KiviParams, head_dim: int, problem: str) -> None:
    with pytest.raises(KvlabError, match=problem):
        Kivi(params, Space(1, 1, 8, head_dim, CPU, torch.float32))
