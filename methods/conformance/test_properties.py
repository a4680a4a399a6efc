"""The suite: each property of each method that `--kvlab-method` names, on each tiny decoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvlab.methods.conformance import properties
from kvlab.methods.conformance.cases import Case, UnfitError


def hold(check: Callable[[Case], None], case: Case) -> None:
    """Run one property; skip where the method and the decoder do not go together."""
    try:
        case.check()
        check(case)
    except UnfitError as error:
        pytest.skip(str(error))
    except properties.Violation as violation:
        pytest.fail(f"{case.name}: {violation}", pytrace=False)


def test_parity(kvlab_case: Case) -> None:
    hold(properties.parity, kvlab_case)


def test_causality(kvlab_case: Case) -> None:
    hold(properties.causality, kvlab_case)


def test_multi_turn(kvlab_case: Case) -> None:
    hold(properties.multi_turn, kvlab_case)


def test_batch(kvlab_case: Case) -> None:
    hold(properties.batch, kvlab_case)


def test_save_and_load(kvlab_case: Case) -> None:
    hold(properties.save_and_load, kvlab_case)


def test_bytes_held(kvlab_case: Case) -> None:
    hold(properties.bytes_held, kvlab_case)


def test_operations(kvlab_case: Case) -> None:
    hold(properties.operations, kvlab_case)


def test_no_waiting(kvlab_case: Case) -> None:
    hold(properties.no_waiting, kvlab_case)


def test_replays(kvlab_case: Case) -> None:
    hold(properties.replays, kvlab_case)
