"""fp8: every row in 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvlab.methods.axis import Value


@dataclass(frozen=True, slots=True)
class Fp8Params:
    """Attributes:
    scale: "row": each row of a KV head is scaled to the format's range; "none": numbers are
        rounded as they are, and what is beyond 448 is clamped.
    """

    scale: Literal["row", "none"] = "row"


ENTRY = Value(
    axis="precision",
    name="fp8",
    summary="keys and values in 8-bit floats (e4m3)",
    params=Fp8Params,
    implementation="kvlab.methods.precision.fp8.storage:Fp8",
    cost="kvlab.methods.precision.fp8.cost",
    sources=("kvlab.methods.precision.by_row", "kvlab.methods.precision.fp8"),
)
