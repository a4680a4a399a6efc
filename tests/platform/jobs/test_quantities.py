"""Numbers as people write them."""

from __future__ import annotations

import pytest
from pydantic_core import PydanticCustomError

from kvlab.platform.jobs.quantities import parse_bytes, parse_count, parse_duration


@pytest.mark.parametrize(
    ("written", "value"),
    [(400_000, 400_000), ("400k", 400_000), ("1.5M", 1_500_000), (2e6, 2_000_000),
     ("2B", 2_000_000_000), ("0.3k", 300), (0, 0)],
)  # fmt: skip
def test_counts(written: object, value: int) -> None:
    assert parse_count(written) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [(1, 1), ("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("7B", 7),
     ("1TiB", 2**40)],
)  # fmt: skip
def test_bytes(written: object, value: int) -> None:
    assert parse_bytes(written) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [(90, 90.0), ("20m", 1200.0), ("1h30m", 5400.0), ("1.5s", 1.5), ("2d", 172800.0)],
)  # fmt: skip
def test_durations(written: object, value: float) -> None:
    assert parse_duration(written) == value


@pytest.mark.parametrize("parse", [parse_count, parse_bytes, parse_duration])
@pytest.mark.parametrize(
    "written",
    ["", "many", "1 0", "-", "k", None, True, [], {}, "1e", "0x10", "1k\n", "1s\n", "1B\n", "٣k"],
)
def test_what_is_no_quantity(parse: object, written: object) -> None:
    with pytest.raises(PydanticCustomError):
        parse(written)  # type: ignore[operator]


@pytest.mark.parametrize(
    "written", [1.5, float("nan"), float("inf"), 2**60, "0.0001k", "99999999999G"]
)
def test_counts_are_whole_and_bounded(written: object) -> None:
    with pytest.raises(PydanticCustomError):
        parse_count(written)
