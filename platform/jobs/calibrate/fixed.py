"""What a calibrate job found, as the budget of a run-time method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvlab import KvlabError
from kvlab.methods.axis import Choice, Method
from kvlab.methods.budget.amount import Amount, least_rows
from kvlab.methods.budget.division import divide
from kvlab.methods.budget.per_layer.params import ENTRY, PerLayerParams

FILE = "calibration.json"
MOST = 2**20
"""Rows of one layer: as many as `per_layer` can say."""


def calibrated(apply: Method, folder: Path, prompt: int | None = None) -> Method:
    """Return `apply` with its budget divided among the layers as a calibrate job found.

    Args:
        folder: what that job published.
        prompt: rows of every prompt where they are known: a share is then turned into rows whose
            sum is exactly that of the uniform budget; else each layer gets its share.

    Raises:
        KvlabError: the folder holds no calibration.
    """
    shares = _shares(folder)
    asked = apply["budget"].params
    assert isinstance(asked, Amount)
    if asked.tokens is None and prompt is None:
        params = PerLayerParams(shares=_capped([s * asked.share for s in shares]))
    else:
        params = PerLayerParams(tokens=_divided(shares, asked.rows(prompt or 1), least_rows(apply)))
    return Method(apply.label, {**apply.choices, "budget": Choice(ENTRY, params)})


def _shares(folder: Path) -> list[float]:
    try:
        raw: dict[str, Any] = json.loads((folder / FILE).read_bytes())
        return [float(share) for share in raw["budgets"]["shares"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KvlabError(
            f"{folder / FILE}: holds no budgets of a calibrate job ({error})"
        ) from None


def _divided(shares: Sequence[float], rows: int, least: int) -> tuple[int, ...]:
    """Whole rows whose mean is `rows`, no layer below `least`."""
    wanted = torch.tensor([shares], dtype=torch.float64) * rows
    divided = divide(wanted, torch.tensor([rows * len(shares)]), least, MOST)
    return tuple(int(n) for n in divided[0])


def _capped(shares: list[float]) -> tuple[float, ...]:
    """Shares of a prompt, none above 1: what one layer cannot use, the others get."""
    total = sum(shares)
    for _ in shares:
        over = sum(share - 1 for share in shares if share > 1)
        room = sum(share for share in shares if share < 1)
        if over < 1e-12 or not room:
            break
        shares = [1.0 if share >= 1 else share * (1 + over / room) for share in shares]
    assert abs(sum(shares) - total) < 1e-6 or min(shares) >= 1
    return tuple(min(1.0, share) for share in shares)
