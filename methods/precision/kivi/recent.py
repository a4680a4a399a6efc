"""The newest rows of each sample, in the model's dtype, each with the slot it is meant for."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.methods.cache.storage import Space

NOWHERE = torch.iinfo(torch.int32).max
"""The slot of a row that holds nothing, or whose slot a newer row has taken."""


class Recent:
    """A ring: of the rows that a sample was given, number r lies at place r % length.

    Attributes:
        rows: [B, H, length, D].
        slots: [B, H, length] int32.
    """

    def __init__(self, length: int, space: Space) -> None:
        self.length = length
        self.rows = space.zeros(length, space.head_dim, dtype=space.dtype)
        self.slots = space.zeros(length, dtype=torch.int32).fill_(NOWHERE)

    def places(self, slots: int, samples: Tensor | slice) -> Tensor:
        """The slots [b, H, length] as an index; rows that go nowhere, or beyond, go to `slots`."""
        return self.slots[samples].clamp(max=slots).long()

    def oldest(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The row [B, H, 1, D] that row `number` [B] will push out, and its slot [B, H, 1]."""
        place = (number % self.length)[:, None, None].expand(*self.slots.shape[:2], 1)
        rows = self.rows.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, self.rows.shape[-1]))
        return rows, self.slots.gather(2, place)

    def forget(self, samples: Tensor | slice) -> None:
        """Let go of all rows of these samples."""
        self.slots[samples] = NOWHERE

    def fill(self, rows: Tensor, counts: Tensor, first: Tensor) -> None:
        """Begin with the last of so many rows [B] of [B, H, n, D], from number `first` [B] on.

        Row number r goes to slot r.
        """
        ring = torch.arange(self.length, device=rows.device)
        last = counts[:, None] - 1
        number = (last - (last - ring) % self.length)[:, None]
        index = number.clamp(min=0).unsqueeze(-1).expand(*self.rows.shape)
        self.rows.copy_(rows.gather(2, index).masked_fill(number.unsqueeze(-1) < 0, 0))
        self.slots.copy_(number.masked_fill(number < first[:, None, None], NOWHERE))

    def push(self, number: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Add row `number` [B] of each sample, [B, H, 1, D], for slots [B, 1 or H, 1]."""
        shape = (*self.slots.shape[:2], 1)
        place = (number % self.length)[:, None, None].expand(shape)
        self.slots.masked_fill_(self.slots == slots, NOWHERE)
        self.slots.scatter_(2, place, slots.to(torch.int32).expand(shape))
        self.rows.scatter_(2, place.unsqueeze(-1).expand(rows.shape), rows)

    def extend(
        self, number: Tensor, taken: Tensor, rows: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the first `taken` [B] of rows [B, H, n, D], which are those from `number` [B] on.

        Args:
            taken: no more than `length`.
            slots: [B, H, n]; NOWHERE where a head does not want a row.

        Returns:
            The rows [B, H, length, D] that lay in the ring, and the slots [B, H, length] of those
            that were pushed out and still had one then: NOWHERE elsewhere.
        """
        width = rows.shape[2]
        columns = torch.arange(width, device=rows.device)
        ring = torch.arange(self.length, device=rows.device)
        turn = (ring - number[:, None]) % self.length  # which of the new rows a place waits for
        lands = (turn < taken[:, None])[:, None]
        slots = slots.masked_fill((columns >= taken[:, None])[:, None], NOWHERE)
        # A row that comes before a place's turn takes its slot; later ones find it pushed out.
        sooner = (columns < turn.unsqueeze(-1))[:, None]
        lost = ((self.slots.unsqueeze(-1) == slots.unsqueeze(2)) & sooner).any(-1)
        before = self.slots.masked_fill(lost, NOWHERE)
        later = columns > columns[:, None]
        again = ((slots.unsqueeze(-1) == slots.unsqueeze(2)) & later).any(-1)
        slots = slots.masked_fill(again, NOWHERE)
        index = turn.clamp(max=width - 1)[:, None].expand_as(self.slots)
        fresh = rows.gather(2, index.unsqueeze(-1).expand_as(self.rows))
        pushed, old = before.masked_fill(~lands, NOWHERE), self.rows.clone()
        self.slots.copy_(torch.where(lands, slots.gather(2, index), before))
        self.rows.copy_(torch.where(lands.unsqueeze(-1), fresh, self.rows))
        return old, pushed
