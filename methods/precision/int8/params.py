"""int8: every row in 8-bit integers, with one scale for each KV head."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab.methods.axis import Value


@dataclass(frozen=True, slots=True)
class Int8Params:
    """int8 has no settings."""


ENTRY = Value(
    axis="precision",
    name="int8",
    summary="keys and values in 8-bit integers, a scale for each row and KV head",
    params=Int8Params,
    implementation="kvlab.methods.precision.int8.storage:Int8",
    cost="kvlab.methods.precision.int8.cost",
    sources=("kvlab.methods.precision.by_row", "kvlab.methods.precision.int8"),
)
