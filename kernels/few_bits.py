"""Rows in 2 or 4 bits whose numbers share scales in groups, and the newest rows over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.kernels.quantise import dequantise, unpack


@dataclass(frozen=True, slots=True)
class Groups:
    """The keys of a cache, or its values: codes of S rows, and which rows stand over them.

    Those, the recent rows [B, H_kv, L, D], come beside it.

    Attributes:
        codes: uint8, packed (`quantise.pack`). Of keys [B, H_kv, groups, bytes, D]: a group is a
            channel of neighbouring slots, as many as the bytes hold. Of values
            [B, H_kv, S, groups, bytes]: it is D / groups neighbouring channels of a row.
        scale, low: of each group, with 1 in the place of `bytes`, in the dtype of the rows.
        slots: [B, H_kv, L] integers from 0: in whose place each recent row is read. A number of S
            or more: in nobody's. The others differ from each other.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    slots: Tensor

    def keys(self, bits: int, recent: Tensor) -> Tensor:
        """Return the keys [B, H_kv, S or more, D] of all slots that the groups have."""
        groups, slots = self.codes.shape[2], self.codes.shape[3] * 8 // bits
        room, rows = self._room(recent, groups * slots)
        grouped = torch.unflatten(rows, 2, (groups, slots))
        dequantise(unpack(self.codes, bits, -2), self.scale, self.low, grouped)
        return self._laid(recent, room)

    def values(self, bits: int, recent: Tensor) -> Tensor:
        """Return the values [B, H_kv, S, D] of all rows."""
        rows, groups = self.codes.shape[2:4]
        room, shown = self._room(recent, rows)
        grouped = torch.unflatten(shown, 3, (groups, recent.shape[-1] // groups))
        codes = unpack(self.codes, bits, -1)[..., : grouped.shape[-1]]
        dequantise(codes, self.scale, self.low, grouped)
        return self._laid(recent, room)

    def _room(self, recent: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """A tensor for so many rows and one that is nobody's, and its view without that one."""
        batch, heads, _, dim = recent.shape
        room = self.scale.new_empty(batch, heads, rows + 1, dim)
        return room, room[:, :, :-1]

    def _laid(self, recent: Tensor, room: Tensor) -> Tensor:
        """Write the recent rows over those of a room; the last takes those that are nowhere."""
        places = self.slots.clamp(max=room.shape[2] - 1).long().unsqueeze(-1)
        return room.scatter_(2, places.expand_as(recent), recent)[:, :, :-1]


@dataclass(frozen=True, slots=True)
class FewBits:
    """Keys in few bits by channel, values by row (KIVI, arXiv 2402.02750).

    A number is code * scale + low, each step rounded to the dtype of the scale.

    Attributes:
        bits: of a code, 2 or 4.
        keys: S = the rows of `values`, rounded up to whole groups.
        values: see `Groups`.
    """

    bits: int
    keys: Groups
    values: Groups

    @property
    def count(self) -> int:
        """How many rows there are, S."""
        return self.values.codes.shape[2]

    def rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies [B, H_kv, S, D] of keys and values, from those that are recent."""
        keys = self.keys.keys(self.bits, k)[:, :, : self.count]
        return keys, self.values.values(self.bits, v)
