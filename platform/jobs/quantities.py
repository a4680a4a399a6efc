"""Numbers as people write them: 400k tokens, 512MiB, 20m. Parsed to int, int and seconds."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

COUNT_PATTERN = r"^[0-9]+(\.[0-9]+)?[kKMGB]$"
BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)? ?([kKMGT]i?)?B$"
DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?[smhd])+$"

LARGEST = 2**53
"""The largest whole number that JSON readers agree on."""

_COUNT_UNITS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_count(written: Any) -> int:
    """Return the whole number that `400000`, `2e6`, `400k` or `1.5M` stands for."""
    number: float | None = None
    if isinstance(written, str) and re.fullmatch(COUNT_PATTERN, written):
        number = round(float(written[:-1]) * _COUNT_UNITS[written[-1]], 6)
    elif isinstance(written, int | float) and not isinstance(written, bool):
        number = written
    return _whole(number, "a whole number such as 400000, 400k, 1M or 2e6")


def parse_bytes(written: Any) -> int:
    """Return the bytes that `1048576`, `512MiB` or `2GB` stands for."""
    number: float | None = None
    if isinstance(written, str) and (match := re.fullmatch(BYTES_PATTERN, written)):
        prefix = match.group(2) or ""
        base = 1024 if prefix.endswith("i") else 1000
        power = " kMGT".index(prefix[0].replace("K", "k")) if prefix else 0
        digits = re.match(r"[0-9.]+", written)
        assert digits is not None
        number = round(float(digits.group()) * base**power, 6)
    elif isinstance(written, int | float) and not isinstance(written, bool):
        number = written
    return _whole(number, "bytes such as 1048576, 512MiB or 2GB")


def parse_duration(written: Any) -> float:
    """Return the seconds that `90`, `20m` or `1h30m` stands for."""
    if isinstance(written, str) and re.fullmatch(DURATION_PATTERN, written):
        parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", written)
        return float(sum(float(number) * _SECONDS[unit] for number, unit in parts))
    if isinstance(written, int | float) and not isinstance(written, bool):
        return float(written)
    raise PydanticCustomError(
        "quantity", "must be seconds such as 90, or a time such as 20m, 1h30m"
    )


def _whole(number: float | None, expected: str) -> int:
    if number is None or number != number or abs(number) > LARGEST or number != int(number):
        raise PydanticCustomError("quantity", "must be {expected}", {"expected": expected})
    return int(number)


def _schema(pattern: str, low: int) -> dict[str, Any]:
    return {
        "anyOf": [
            {"type": "number", "minimum": low},
            {"type": "string", "pattern": pattern},
        ]
    }


Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema(_schema(COUNT_PATTERN, 0))]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_schema(BYTES_PATTERN, 1))]
Seconds = Annotated[
    float, BeforeValidator(parse_duration), WithJsonSchema(_schema(DURATION_PATTERN, 0))
]
