"""Attention whose mask comes from positions: the torch twin that every kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.choice import fused
from kvlab.kernels.precision import working_dtype
from kvlab.kernels.quantise import FLOAT8
from kvlab.kernels.stored import Stored

EMPTY = -1
"""The position of a row that holds nothing: padding, or a cache slot not yet written."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys a query may read, from the two positions alone (query p, key j).

    Attributes:
        strict: j < p instead of j <= p (upward sharing). A query with no key left gives zero.
        window: keep only p - j < window (tokens, the query's own included). None: no window.
        sinks: positions j < sinks are exempt from the window.
    """

    strict: bool = False
    window: int | None = None
    sinks: int = 0

    def is_causal(self, rows: int, by: int = 0) -> bool:
        """Whether among so many packed rows every query reads exactly its past.

        `by` 0: and itself; 1: without itself.
        """
        return self.strict == bool(by) and (self.window is None or self.window >= rows)

    def allows(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the mask [B, 1 or H_kv, T, S], true where query t may read key s.

        Args:
            q_positions: [B, T] integer; EMPTY rows read nothing.
            k_positions: [B, S], or [B, H_kv, S] where each KV head keeps its own rows.
        """
        p = q_positions[:, None, :, None]
        j = k_positions[:, None, None, :] if k_positions.dim() == 2 else k_positions[:, :, None, :]
        allowed = (j >= 0) & ((j < p) if self.strict else (j <= p))
        if self.window is not None:
            allowed = allowed & ((p - j < self.window) | (j < self.sinks))
        return allowed


CAUSAL = Rule()
CODES = (torch.int8, torch.uint8, FLOAT8)
"""Dtypes of rows that are stored in 8 bits; bytes are 8-bit floats."""
MOST_SHARES = 1 << 24
"""Probabilities that are held at a time where the key mass is asked for: 64 MiB."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    rule: Rule = CAUSAL,
    mass_rows: slice | None = None,
    mask: Callable[[], Tensor | None] | None = None,
    stored: Stored | None = None,
    *,
    each: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, grouped queries included.

    Args:
        q: [B, H, T, D]; already rotated.
        k: [B, H_kv, S, D]; H is a multiple of H_kv.
        v: [B, H_kv, S, D_v].
        q_positions: [B, T]. None states that queries are packed rows 0..T-1, none empty, and beside
            no `k_positions` that the keys are the same rows (training on packed text), so that the
            fused causal path may be used.
        k_positions: [B, S] or [B, H_kv, S]; EMPTY marks rows that hold nothing. None beside given
            `q_positions` states that every query may read every key (a decode step over a cache
            without empty rows), so that no mask is needed. The very tensor that `q_positions` is
            states that keys are the same rows, in the order of their positions (a padded prompt),
            so that those behind a row need not be looked at.
        rule: what a query may read.
        mass_rows: also return each key's attention summed over these query rows of T.
        mask: returns what `rule` allows by these positions, where layers share it; asked only where
            a mask is needed.
        stored: how keys and values lie: k and v are then rows of a pool (`Stored.table`), int8
            codes, 8-bit floats (float8_e4m3fn or its bytes; none is NaN), or the recent rows of a
            cache in few bits (`Stored.few`). On CUDA no row is copied.
        each: return the attention of every one of those rows, not their sum.

    Returns:
        out [B, H, T, D_v] in the dtype of q, zero for a query that may read nothing; and the key
        mass [B, H, S] in float32 ([B, H, rows, S] if `each`), or None.

    Raises:
        ValueError: on CUDA, an argument does not fit the others.
    """
    rows = q.shape[2]
    packed = q_positions is None and k_positions is None
    causal = packed and rule.is_causal(rows)
    shifted = packed and rule.is_causal(rows, by=1)
    plain = mass_rows is None and stored is None and (causal or shifted)
    if not plain and _fusible(q, k, v, stored, each):
        from kvlab.kernels.gpu.attention import attend as attend_fused

        return attend_fused(q, k, v, q_positions, k_positions, rule, mass_rows, stored)
    held = None
    if stored is not None:
        k, v = stored.rows(k, v, q.dtype)
        held = stored.held(k.shape[2])
        causal = causal and held is None
    if mass_rows is None and shifted and held is None:
        # Row t reads what row t - 1 of an ordinary causal pass reads, and row 0 nothing.
        out, _ = attend(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], None, None)
        return F.pad(out, (0, 0, 1, 0)), None
    allowed = None
    if not causal:
        allowed = _allowed(q, q_positions, k_positions, rule) if mask is None else mask()
    if held is not None:
        allowed = held.unsqueeze(2) if allowed is None else allowed & held.unsqueeze(2)
        allowed = allowed.expand(-1, -1, rows, -1)
    if mass_rows is None:
        return _attend(q, k, v, allowed, causal), None
    return _attend_seen(q, k, v, allowed, causal, range(rows)[mass_rows], each)


def _allowed(
    q: Tensor, q_positions: Tensor | None, k_positions: Tensor | None, rule: Rule
) -> Tensor | None:
    """The mask [B, 1 or H_kv, T, S] by positions; None: every query may read every key."""
    if q_positions is None:
        q_positions = torch.arange(q.shape[2], device=q.device).unsqueeze(0)
        k_positions = q_positions if k_positions is None else k_positions
    return None if k_positions is None else rule.allows(q_positions, k_positions)


def _fusible(q: Tensor, k: Tensor, v: Tensor, stored: Stored | None, each: bool) -> bool:
    """Whether our kernels can answer: without gradients, in the dtype as it is."""
    if not fused(q) or each:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    dtype = working_dtype(q)
    coded = stored is not None and stored.few is None
    known = (dtype, *CODES) if coded else (dtype,)
    return (
        q.dtype == dtype
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(x.dtype in known for x in (k, v))
        and all(x.shape[-1] <= 256 for x in (q, k, v))
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention by the fastest kernel that torch has for it."""
    if q.shape[2] == 1:
        return _attend_folded(q, k, v, mask)
    group = q.shape[1] // k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)
    if q.device.type != "cpu":
        return _attend_folded(q, k, v, mask)
    if mask.shape[1] > 1:
        mask = mask.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=group > 1)


def _attend_folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The query heads of a KV head become its rows, so that no key is repeated in memory.

    CUDA's fused kernels take a mask or groups, not both; on CPU a single row is faster so.
    """
    batch, heads, rows, dim = q.shape
    folded = q.reshape(batch, k.shape[1], -1, dim)
    readable = None
    if mask is not None and rows > 1 and folded.shape[2] > rows:
        group = folded.shape[2] // rows
        mask = mask.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
    if mask is not None and q.device.type != "cpu":  # only there a row that reads nothing is zero
        readable = mask.any(-1, keepdim=True)
        mask = mask | ~readable
    out = F.scaled_dot_product_attention(folded, k, v, mask)
    if readable is not None:
        out = out.masked_fill(~readable, 0.0)
    return out.reshape(batch, heads, rows, v.shape[-1])


def _attend_seen(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, seen: range, each: bool
) -> tuple[Tensor, Tensor]:
    """Attention, and the key mass of the query rows `seen`, a few rows at a time.

    Where all rows are seen the output comes from the same probabilities.
    """
    batch, heads, rows, _ = q.shape
    shape = (batch, heads, len(seen), k.shape[2]) if each else (batch, heads, k.shape[2])
    mass = q.new_zeros(shape, dtype=torch.float32)
    parts = []
    at_once = max(1, MOST_SHARES // (batch * heads * k.shape[2]))
    for start in range(seen.start, seen.stop, at_once):
        part = slice(start, min(start + at_once, seen.stop))
        if causal:
            places = torch.arange(k.shape[2], device=q.device)
            allowed: Tensor | None = (places <= places[part, None])[None, None]
        else:
            allowed = None if mask is None else mask[:, :, part]
        shares = _shares(q[:, :, part], k, allowed, reads=causal)
        by_head = torch.unflatten(shares, 2, (-1, part.stop - part.start))
        if each:
            mass[:, :, part.start - seen.start : part.stop - seen.start] = by_head.flatten(1, 2)
        else:
            mass += by_head.sum(3).flatten(1, 2)
        if len(seen) == rows:
            out = shares.to(v.dtype) @ v
            parts.append(out.view(batch, heads, -1, v.shape[-1]))
    if parts:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2), mass
    return _attend(q, k, v, None if causal else mask, causal), mass


def _shares(q: Tensor, k: Tensor, mask: Tensor | None, *, reads: bool = False) -> Tensor:
    """The probabilities [B, H_kv, G T, S] in the open, in float32; a group's queries in order.

    Args: reads: it is known that every row may read a key.
    """
    batch, _, rows, dim = q.shape
    folded = q.reshape(batch, k.shape[1], -1, dim).float() * dim**-0.5
    scores: Tensor = folded @ k.float().transpose(-1, -2)
    if mask is None:
        return scores.softmax(-1)
    group = folded.shape[2] // rows
    if group > 1:
        mask = mask.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
    shares = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return shares if reads else shares * mask  # a row that may read nothing gives zero
