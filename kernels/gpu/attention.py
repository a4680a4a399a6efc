"""`attend` on CUDA: what the kernels take is checked, tiles are chosen, kernels launched."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from kvlab.kernels.attention import CAUSAL, CODES, Rule
from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.given import refuse_unlike
from kvlab.kernels.gpu.forward import combine, forward
from kvlab.kernels.gpu.mass import weigh
from kvlab.kernels.quantise import FLOAT8
from kvlab.kernels.stored import Stored

MOST_PARTS = 64
"""Programs that may share a query's keys."""
WEIGHED = 64
"""Query rows of a tile for the mass."""
PLAIN = Stored()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
WIDEST = 256
"""Numbers in a head."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    rule: Rule = CAUSAL,
    mass_rows: slice | None = None,
    stored: Stored | None = None,
    *,
    parts: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `kvlab.kernels.attention.attend` says, without gradients.

    Args:
        parts: into how many parts the keys are divided for programs of their own; None: so many
            that the device has enough to do.

    Raises:
        ValueError: an argument has a shape, dtype or device that does not fit.
    """
    batch, heads, rows, dim = q.shape
    stored = PLAIN if stored is None else stored
    paged, few = stored.table is not None, stored.few
    if few is not None:
        _check_few(q, k, v, stored, few)
    kv_heads, keys = k.shape[1], _count(k, stored)
    _check(q, k, v, q_positions, k_positions, stored, keys)
    packed = q_positions is None and k_positions is None
    if packed and keys != rows:
        raise ValueError(f"k: rows without positions are the queries' own {rows}, found {keys}")

    if mass_rows is not None and mass_rows.step not in (None, 1):
        raise ValueError(f"mass_rows: must have step 1, found {mass_rows.step}")

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    group = heads // kv_heads
    worked = few is not None or stored.turn is not None
    shape = _Shape(group, rows, max(dim, v.shape[-1]), q.element_size(), worked)
    given = {
        "q": (q, *q.stride()[:3]),
        "k": _laid(k, paged),
        "k_scale": _laid(stored.k_scale, paged),
        "q_at": None if q_positions is None else _each(q_positions, batch, rows),
        "k_at": None if k_positions is None else _each(k_positions, batch, kv_heads, keys),
        "lengths": None if stored.lengths is None else _each(stored.lengths, batch, kv_heads),
        "table": None if stored.table is None else _each(stored.table, batch, kv_heads, keys),
        "k_few": None if few is None else _few(few.keys, keys),
        "turn": _turn(stored, batch, kv_heads, keys),
        "T": rows,
        "S": keys,
        "window": rule.window or 0,
        "sinks": rule.sinks,
        "scale": dim**-0.5 * math.log2(math.e),
        "KV": kv_heads,
        "HEADS": group,
        "GROUP": shape.group,
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "PACKED": packed,
        "ORDERED": k_positions is q_positions,
        "STRICT": rule.strict,
        "WINDOWED": rule.window is not None,
        "FLOAT8": k.dtype in (torch.uint8, FLOAT8),
        "BITS": 0 if few is None else few.bits,
        "SLOTS": 0 if few is None else _slots(few),
    }
    with torch.cuda.device(q.get_device()):  # -1, the CPU's, changes nothing
        values = {
            "v": _laid(v, paged),
            "v_scale": _laid(stored.v_scale, paged),
            "v_few": None if few is None else _few(few.values, keys),
            "CHANNELS": 0 if few is None else _channels(v, few),
        }
        out, lse = _forward(given | values, shape, v.shape[-1], mass_rows is not None, parts)
        mass = None if mass_rows is None else _mass(given, shape, lse, range(rows)[mass_rows])
    return out, mass


class _Shape:
    """The tiles of a call: blocks of keys of at most 16 KiB, and what registers hold of queries.

    Attributes:
        group: query heads of a tile; groups: such tiles that a KV head needs. tokens: of a tile.
        tiles: that a KV head's queries make. keys: of a block. weighed: a tile's rows for the mass.
    """

    def __init__(self, group: int, rows: int, dim: int, size: int, worked: bool) -> None:
        """Args: dim: numbers of a head, of `size` bytes. worked: keys are computed, not loaded."""
        wide = max(16, triton.next_power_of_2(dim)) * size  # bytes of a row
        most = (128 if wide <= 256 else 64) if size < 4 else max(16, 8192 // wide)
        self.group = min(triton.next_power_of_2(group), most, WEIGHED)
        self.groups = -(-group // self.group)
        height = min(most, max(16, triton.next_power_of_2(self.group * rows)))
        self.tokens = height // self.group
        self.keys = max(16, min(128, (8192 if worked else 16384) // wide))
        self.tiles = -(-rows // self.tokens) * self.groups
        self.warps = 8 if height == 128 else 4
        self.weighed = min(height, WEIGHED)


def _forward(
    given: dict[str, Any], shape: _Shape, width: int, weighed: bool, parts: int | None
) -> tuple[Tensor, Tensor | None]:
    """The output [B, H, T, D_v] and, if it is wanted, the log-sum-exp [B, H, T] in powers of 2."""
    q: Tensor = given["q"][0]
    lines, pairs = q.shape[:3], len(q) * given["KV"]
    out = q.new_empty(*lines, width)
    lse = q.new_empty(lines, dtype=torch.float32) if weighed else None
    if not out.numel():
        return out, lse
    if parts is None:
        parts = 1 if given["ORDERED"] else _parts(pairs * shape.tiles, given["S"], shape.keys, q)
    partial, partial_lse = out, lse
    if parts > 1:
        partial = q.new_empty(parts, *lines, width, dtype=torch.float32)
        partial_lse = q.new_empty(parts, *lines, dtype=torch.float32)
    wide = max(16, triton.next_power_of_2(width))
    forward[pairs * shape.tiles, parts](
        **given, out=partial, lse=partial_lse, D_V=width, BLOCK_V=wide, BLOCK_T=shape.tokens,
        BLOCK_N=shape.keys, num_warps=shape.warps, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        combine[lines.numel(),](
            partial, partial_lse, out, lse, parts, D_V=width, BLOCK_V=wide,
            BLOCK_P=triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return out, lse


def _mass(given: dict[str, Any], shape: _Shape, lse: Tensor | None, rows: range) -> Tensor:
    """The key mass [B, H, S] of query rows."""
    q: Tensor = given["q"][0]
    keys = given["S"]
    mass = q.new_empty(*q.shape[:2], keys, dtype=torch.float32)
    if not mass.numel():
        return mass
    blocks = -(-keys // shape.keys)
    weigh[len(q) * given["KV"] * blocks * shape.groups,](
        **given, lse=lse, mass=mass, start=rows.start, stop=rows.stop,
        BLOCK_T=shape.weighed // shape.group, BLOCK_N=shape.keys, num_warps=4, num_stages=2,
    )  # fmt: skip
    return mass


def _parts(programs: int, keys: int, block: int, q: Tensor) -> int:
    """Parts of four blocks of keys or more, so many that there are two programs a processor."""
    wanted = 2 * _processors(q.device) // max(1, programs)
    return max(1, min(MOST_PARTS, wanted, keys // (4 * block)))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _laid(x: Tensor | None, paged: bool) -> tuple[Any, ...] | None:
    """A tensor with its strides by sample, head and row; a pool's rows are of all samples."""
    if x is None:
        return None
    x = x.view(torch.uint8) if x.dtype == FLOAT8 else x
    return (x, 0, x.stride(1), x.stride(0)) if paged else (x, *x.stride()[:3])


def _count(k: Tensor, stored: Stored) -> int:
    """How many rows the cache has, S."""
    if stored.few is not None:
        return stored.few.count
    return k.shape[2] if stored.table is None else stored.table.shape[-1]


def _slots(few: FewBits) -> int:
    """Slots of a key group."""
    return few.keys.codes.shape[3] * 8 // few.bits


def _channels(v: Tensor, few: FewBits) -> int:
    """Channels of a value group."""
    return v.shape[-1] // few.values.codes.shape[3]


def _few(groups: Groups, keys: int) -> tuple[Any, ...]:
    """What kernels take of groups; last the number of the recent row in each slot, -1: none."""
    parts = (_laid(x, False) for x in (groups.codes, groups.scale, groups.low))
    slots = groups.slots
    # Whole lines of 16: the same kernel however many rows there are. The last is for nobody's.
    wide = (keys // 16 + 1) * 16
    shown = slots.new_full((*slots.shape[:2], wide), -1, dtype=torch.int32)
    recent = torch.arange(slots.shape[2], dtype=torch.int32, device=slots.device)
    shown.scatter_(2, slots.clamp(max=keys).long(), recent.expand(slots.shape))
    return *parts, (shown, *shown.stride())


def _each(x: Tensor, batch: int, *shape: int) -> tuple[Any, ...]:
    """A tensor [B or 1, ...] with its strides in [B, *shape]; heads may be left out."""
    if x.dim() < 1 + len(shape):
        x = x.unsqueeze(1)
    x = x.expand(batch, *shape)
    return (x, *x.stride())


def _turn(stored: Stored, batch: int, kv_heads: int, keys: int) -> tuple[Any, ...] | None:
    turn = stored.turn
    if turn is None:
        return None
    at = _each(turn.positions, batch, kv_heads, keys)
    return *at, turn.cos.contiguous(), turn.sin.contiguous(), turn.cos.shape[1], len(turn.cos)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    stored: Stored,
    keys: int,
) -> None:
    """Refuse what does not fit together, by shapes, dtypes and devices alone."""
    paged, turn = stored.table is not None, stored.turn
    batch, heads, rows, dim = q.shape
    kv_heads, width = k.shape[1], v.shape[-1]
    if q.dtype not in FLOATS:
        raise ValueError(f"q: must be float32, bfloat16 or float16, found {q.dtype}")
    known = (q.dtype,) if stored.few is not None else (q.dtype, *CODES)
    if k.dtype not in known or v.dtype != k.dtype:
        listed = " or ".join(str(dtype) for dtype in known)
        raise ValueError(f"k, v: must be {listed}, the same of both, "
                         f"found {k.dtype} and {v.dtype}")  # fmt: skip
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads do not divide the {heads} of q")
    if not 0 < max(dim, width) <= WIDEST:
        raise ValueError(f"q, v: heads must be of 1 to {WIDEST} numbers, found {dim} and {width}")
    lead: tuple[int, ...] = (batch, kv_heads, keys)
    k_lead, v_lead = ((len(k), kv_heads),) * 2 if paged else (lead, lead)
    if stored.few is not None:
        k_lead, v_lead = ((*lead[:2], x.shape[2]) for x in (k, v))
    by_head = [(batch, keys), (1, keys), (batch, kv_heads, keys), (1, kv_heads, keys)]
    wanted: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("k", k, [(*k_lead, dim)]),
        ("v", v, [(*v_lead, width)]),
        ("q_positions", q_positions, [(batch, rows), (1, rows)]),
        ("k_positions", k_positions, [*by_head, (batch, 1, keys), (1, 1, keys)]),
        ("k_scale", stored.k_scale, [(*k_lead, 1)]),
        ("v_scale", stored.v_scale, [(*v_lead, 1)]),
        ("table", stored.table, by_head),
        ("lengths", stored.lengths, [(batch,), (batch, kv_heads), (batch, 1)]),
    ]
    if turn is not None:
        if turn.cos.dim() != 2 or 2 * turn.cos.shape[1] > dim:
            raise ValueError(f"turn.cos: must be [P, {dim // 2} or fewer], found "
                             f"{list(turn.cos.shape)}")  # fmt: skip
        wanted += [
            ("turn.positions", turn.positions, by_head),
            ("turn.cos", turn.cos, [tuple(turn.cos.shape)]),
            ("turn.sin", turn.sin, [tuple(turn.cos.shape)]),
        ]
    for name, pool in (("k", k), ("v", v)):
        if paged and pool.stride(-1) != 1:
            raise ValueError(f"{name}: numbers of a pool's row must be neighbours, found strides "
                             f"{pool.stride()}")  # fmt: skip
    for name, x, shapes in wanted:
        if x is None:
            continue
        if tuple(x.shape) not in shapes:
            listed = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name}: must be {listed}, found {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name}: must be on {q.device} like q, found {x.device}")
        if name.endswith(("positions", "table", "lengths")) and x.dtype not in INTEGERS:
            raise ValueError(f"{name}: must be int32 or int64, found {x.dtype}")


def _check_few(q: Tensor, k: Tensor, v: Tensor, stored: Stored, few: FewBits) -> None:
    """Refuse what does not fit the recent rows k, v."""
    for name in ("k_scale", "v_scale", "table"):
        if getattr(stored, name) is not None:
            raise ValueError(f"{name}: rows in few bits have none")
    if few.bits not in (2, 4):
        raise ValueError(f"few.bits: must be 2 or 4, found {few.bits}")
    keys, values, width = few.keys, few.values, v.shape[-1]
    for name, codes in (("keys", keys.codes), ("values", values.codes)):
        if codes.dim() != 5 or not all(codes.shape[3:]):
            raise ValueError(f"few.{name}.codes: must have 5 dimensions, found {list(codes.shape)}")
    groups, blocks = keys.codes.shape[2], values.codes.shape[3]
    if groups * _slots(few) < few.count:
        raise ValueError(f"few.keys.codes: {groups} groups of {_slots(few)} slots do not hold "
                         f"{few.count} rows")  # fmt: skip
    bits = _channels(v, few) * few.bits  # of a value group
    if width % blocks or (blocks > 1 and bits % 8):
        raise ValueError(f"few.values.codes: {blocks} groups of whole bytes do not make up "
                         f"{width} channels")  # fmt: skip
    lead = (len(q), k.shape[1])
    of_keys = (*lead, groups, keys.codes.shape[3], k.shape[-1])
    _check_groups("few.keys", keys, of_keys, (1, k.shape[-1]), k.shape[2], q)
    of_values = (*lead, few.count, blocks, -(-bits // 8))
    _check_groups("few.values", values, of_values, (blocks, 1), v.shape[2], q)


def _check_groups(
    name: str, groups: Groups, codes: tuple[int, ...], one: tuple[int, int], recent: int, q: Tensor
) -> None:
    """Refuse codes that are not of a shape, scales not [*codes[:3], *one], rows with gaps."""
    refuse_unlike(f"{name}.codes", groups.codes, codes, q, (torch.uint8,))
    refuse_unlike(f"{name}.scale", groups.scale, (*codes[:3], *one), q, (q.dtype,))
    refuse_unlike(f"{name}.low", groups.low, (*codes[:3], *one), q, (q.dtype,))
    refuse_unlike(f"{name}.slots", groups.slots, (*codes[:2], recent), q, INTEGERS)
    for part, x in (("codes", groups.codes), ("scale", groups.scale), ("low", groups.low)):
        if x.numel() and not x[0, 0, 0].is_contiguous():
            raise ValueError(f"{name}.{part}: a row must be without gaps, found strides "
                             f"{x.stride()}")  # fmt: skip
