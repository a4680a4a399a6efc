"""Token granularity, the default: one position is one token."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab.methods.axis import Value


@dataclass(frozen=True, slots=True)
class TokenParams:
    """Token granularity has no settings."""


ENTRY = Value(
    axis="granularity",
    name="token",
    summary="one position is one token (the ordinary decoder)",
    params=TokenParams,
    implementation="kvlab.methods.decoder.language_model:TokenModel",
    cost="kvlab.methods.decoder.cost",
    default=True,
    consumes=("sharing", "prefill"),
    sources=(
        "kvlab.methods.packing",
        "kvlab.kernels",
    ),
)
