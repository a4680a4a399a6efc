"""Head and cross entropy in one, so that the probabilities of a batch never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvlab.kernels.precision import working_dtype

LOGITS_PER_CHUNK = 1 << 25
LOGITS_PER_CHUNK_CPU = 1 << 20
"""Logits worked on at a time: so many that launches are few; on CPU what its caches hold."""
LOGITS_KEPT = 1 << 27
"""Logits that training keeps for the backward pass; a larger batch computes them a second time."""


def linear_nll(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Return minus the log probability of each target under softmax(hidden @ table^T).

    Works through chunks of rows: beside the logits (kept for the backward pass up to `LOGITS_KEPT`)
    nothing of size [N, V] is ever made. Follows autocast like `F.linear`.

    Args:
        hidden: [N, W]. table: [V, W]. targets: [N] int64.

    Returns:
        [N], at least float32.
    """
    dtype = working_dtype(table)
    nll: Tensor = _LinearNll.apply(hidden, table, targets, dtype)  # type: ignore[no-untyped-call]
    return nll


class _LinearNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        at_once = LOGITS_PER_CHUNK_CPU if hidden.device.type == "cpu" else LOGITS_PER_CHUNK
        ctx.chunk = max(256, at_once // len(table))
        ctx.dtype = dtype
        kept: list[Tensor] = []
        keep = any(ctx.needs_input_grad) and len(hidden) * len(table) <= LOGITS_KEPT
        nll, normaliser = [], []
        weight = table.to(dtype)
        for rows, wanted in _chunks(ctx.chunk, hidden, targets):
            logits = F.linear(rows.to(dtype), weight)
            if keep:
                kept.append(logits)
            at_target = _wide(logits.gather(1, wanted))
            nll.append(-_wide(logits).log_softmax(-1).gather(1, wanted))
            normaliser.append(nll[-1] + at_target)
        ctx.save_for_backward(hidden, table, targets, torch.cat(normaliser), *kept)
        return torch.cat(nll).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, targets, normaliser, *kept = ctx.saved_tensors
        weight = table.to(ctx.dtype)
        to_hidden = torch.empty_like(hidden)
        to_table = (
            torch.zeros_like(table, dtype=gradient.dtype) if ctx.needs_input_grad[1] else None
        )
        pieces = _chunks(ctx.chunk, hidden, targets, normaliser, gradient, to_hidden)
        for i, (rows, wanted, total, scale, out) in enumerate(pieces):
            logits = kept[i] if kept else F.linear(rows.to(ctx.dtype), weight)
            shares = (logits - total).exp_().mul_(scale)
            shares = shares.scatter_add_(1, wanted, -scale).to(ctx.dtype)
            out.copy_(shares @ weight)
            if to_table is not None:
                to_table += shares.T @ rows.to(ctx.dtype)
        return to_hidden, None if to_table is None else to_table.to(table.dtype), None, None


def _chunks(rows: int, *tensors: Tensor) -> Any:
    """Cut tensors into pieces of so many rows; vectors become columns."""
    columns = [t if t.dim() > 1 else t.unsqueeze(1) for t in tensors]
    return zip(*(torch.split(t, rows) for t in columns), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
