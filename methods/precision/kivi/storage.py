"""KIVI as a storage: groups of key slots, groups of value channels, and recent rows over them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.quantise import pack, quantise
from kvlab.kernels.stored import Stored
from kvlab.methods.axis import MethodError
from kvlab.methods.cache.storage import Space, Storage
from kvlab.methods.precision.kivi.params import KiviParams, problems
from kvlab.methods.precision.kivi.recent import NOWHERE, Recent

ALL = slice(None)


class Kivi(Storage):
    """Rows in few bits, except for the newest.

    A row waits in the model's dtype. Keys are quantised `residual` rows at a time, values one by
    one; as in the reference a decode step reads before it quantises, so a full residual is emptied
    when the next row comes. What is stored depends on a sample's rows and their order alone, not on
    how many came at once, nor on the rest of the batch.

    Where a row overwrites a slot that is quantised already, it waits like any other and `get` shows
    it in its slot; when its time comes, the groups of such slots are read, changed and quantised
    again. All other groups stay as they are. A slot that was never written does not widen its
    group.
    """

    by_row = False

    def __init__(self, params: KiviParams, space: Space) -> None:
        for problem in problems(params, space.head_dim):
            raise MethodError(f"kivi: {problem}")
        self.space, self.bits, self.group = space, params.bits, params.group
        self.error = 1 / (2**params.bits - 1)  # half a step of a group from -1 to 1
        self.width = params.value_group(space.head_dim)
        rows, wide, dtype = space.rows, space.head_dim, space.dtype
        groups, blocks = params.slots(rows) // self.group, wide // self.width
        key_bytes, value_bytes = (-(-n * self.bits // 8) for n in (self.group, self.width))
        # Keys: [B, H, groups, slots of one packed, D]; a scale below 0: no slot was ever written.
        self.key_codes = space.zeros(groups, key_bytes, wide, dtype=torch.uint8)
        self.key_scale = space.zeros(groups, 1, wide, dtype=dtype).fill_(-1)
        self.key_low = space.zeros(groups, 1, wide, dtype=dtype)
        # Values: [B, H, C + 1, groups, channels of one packed]; the last row has no slot.
        self.value_codes = space.zeros(rows + 1, blocks, value_bytes, dtype=torch.uint8)
        self.value_scale = space.zeros(rows + 1, blocks, 1, dtype=dtype)
        self.value_low = space.zeros(rows + 1, blocks, 1, dtype=dtype)
        self.keys = Recent(params.recent(rows), space)
        self.values = Recent(params.recent(rows) + 1, space)
        self.count = torch.zeros(space.batch, dtype=torch.long)
        self.number = torch.zeros(space.batch, dtype=torch.long, device=space.device)

    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        slots = self._by_sample(slots)
        if k.shape[2] == 1:
            self._quantise_keys((self.count > 0) & (self.count % self.keys.length == 0))
            if int(self.count.max()) >= self.values.length:
                self._store_values(*self.values.oldest(self.number))
            self.keys.push(self.number, k, slots)
            self.values.push(self.number, v, slots)
            self.count += 1
            self.number += 1
            return
        self._extend(slots.expand(k.shape[:3]), k, v)

    def fill(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        rows = k.shape[2]
        if not rows:
            return
        self.count.copy_(counts)
        # As if they had come one by one: a full residual waits for the next row.
        blocks = (counts - 1).clamp(min=0) // self.keys.length * self.keys.length
        leave = (counts - self.values.length).clamp(min=0)
        counts, ready, left = _to(k.device, torch.stack((counts, blocks, leave)))
        self.number.copy_(counts)
        self.keys.fill(k, counts, ready)
        self.values.fill(v, counts, left)
        if most := int(blocks.max()):
            kept = torch.unflatten(k[:, :, :most], 2, (-1, self.group))
            codes, scale, low = quantise(kept, self.bits, -2)
            groups = kept.shape[2]
            first = torch.arange(0, most, self.group, device=k.device)
            touched = (first < ready[:, None])[:, None, :, None, None]
            for own, new in self._key_parts(pack(codes, self.bits, -2), scale, low):
                own = own[:, :, :groups]
                own.copy_(torch.where(touched, new, own))
        if most := int(leave.max()):
            slots = torch.arange(most, device=k.device).expand(*k.shape[:2], most)
            gone = slots >= left[:, None, None]
            self._store_values(v[:, :, :most], slots.masked_fill(gone, NOWHERE))

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        k, v, stored = self.lying(rows)
        return stored.rows(k, v, self.space.dtype)

    def lying(self, rows: int) -> tuple[Tensor, Tensor, Stored]:
        parts = (self.value_codes, self.value_scale, self.value_low)
        codes, scale, low = (part[:, :, :rows] for part in parts)
        values = Groups(codes, scale, low, self.values.slots)
        few = FewBits(self.bits, self._keys(-(-rows // self.group), ALL), values)
        return self.keys.rows, self.values.rows, Stored(few=few)

    def state(self) -> dict[str, Tensor]:
        rows = self.space.rows
        return {
            "key_codes": self.key_codes,
            "key_scale": self.key_scale,
            "key_low": self.key_low,
            "value_codes": self.value_codes[:, :, :rows],
            "value_scale": self.value_scale[:, :, :rows],
            "value_low": self.value_low[:, :, :rows],
            "recent_keys": self.keys.rows,
            "recent_key_slots": self.keys.slots,
            "recent_values": self.values.rows,
            "recent_value_slots": self.values.slots,
            "count": self.count,
            "number": self.number,
        }

    def nbytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for part in self.state().values())

    def _extend(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Add rows for slots [B, H, n], as many at a time as the residual has room for."""
        slots = torch.where(slots < 0, NOWHERE, slots)
        real = (slots != NOWHERE).any(1)
        order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        waiting = real.sum(1).cpu()
        done = torch.zeros_like(waiting)
        while bool((waiting > 0).any()):
            used = self.count % self.keys.length
            full = (self.count > 0) & (used == 0)
            self._quantise_keys(full & (waiting > 0))
            taken = torch.minimum(self.keys.length - used, waiting)
            start, some = _to(k.device, torch.stack((done, taken)))
            columns = start[:, None] + torch.arange(int(taken.max()), device=k.device)
            index = order.gather(1, columns.clamp(max=order.shape[1] - 1))[:, None]
            places = slots.gather(2, index.expand(-1, slots.shape[1], -1))
            index = index.unsqueeze(-1).expand(*places.shape, k.shape[-1])
            self.keys.extend(self.number, some, k.gather(2, index), places)
            self._store_values(*self.values.extend(self.number, some, v.gather(2, index), places))
            self.count += taken
            self.number += some
            done += taken
            waiting -= taken

    def _quantise_keys(self, full: Tensor) -> None:
        """Put the recent keys of some samples, [B] bool on the CPU, into their groups."""
        some = full.nonzero().squeeze(1)
        if not len(some):
            return
        samples = ALL if len(some) == len(full) else _to(self.space.device, some)
        total = self.key_scale.shape[2]
        shown = self._keys(total, samples).keys(self.bits, self.keys.rows[samples])
        places = self.keys.places(total * self.group, samples)
        hit = places.new_zeros(*places.shape[:2], total * self.group + 1, dtype=torch.bool)
        hit.scatter_(2, places, True)
        hit = torch.unflatten(hit[:, :, :-1], 2, (total, self.group)).unsqueeze(-1)
        touched = hit.any(3, keepdim=True)
        inside = torch.arange(total * self.group, device=shown.device) < self.space.rows
        known = (self.key_scale[samples][..., :1] >= 0) & inside.view(total, self.group, 1)
        grouped = torch.unflatten(shown, 2, (total, self.group))
        codes, scale, low = quantise(grouped, self.bits, -2, hit | known)
        for own, new in self._key_parts(pack(codes, self.bits, -2), scale, low):
            own[samples] = torch.where(touched, new, own[samples])
        self.keys.forget(samples)

    def _key_parts(self, codes: Tensor, scale: Tensor, low: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(self.key_codes, codes), (self.key_scale, scale), (self.key_low, low)]

    def _keys(self, groups: int, samples: Tensor | slice) -> Groups:
        """The first groups of keys, and where recent ones stand."""
        parts = (self.key_codes, self.key_scale, self.key_low)
        codes, scale, low = (part[samples, :, :groups] for part in parts)
        return Groups(codes, scale, low, self.keys.slots[samples])

    def _store_values(self, rows: Tensor, slots: Tensor) -> None:
        """Quantise value rows [B, H, n, D] into slots [B, H, n]."""
        codes, scale, low = quantise(torch.unflatten(rows, 3, (-1, self.width)), self.bits, -1)
        slots = slots.clamp(max=self.space.rows).long()[..., None, None]
        parts = ((self.value_codes, pack(codes, self.bits, -1)),
                 (self.value_scale, scale), (self.value_low, low))  # fmt: skip
        for own, new in parts:
            own.scatter_(2, slots.expand_as(new), new)

    def _by_sample(self, slots: slice | Tensor) -> Tensor:
        """The slots as [B, 1 or H, n]."""
        if isinstance(slots, slice):
            slots = torch.arange(self.space.rows, device=self.space.device)[slots]
        if slots.dim() == 1:
            slots = slots.expand(self.space.batch, 1, -1)
        return slots


def _to(device: torch.device, numbers: Tensor) -> Tensor:
    """Send numbers from the CPU without waiting for the device."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)
