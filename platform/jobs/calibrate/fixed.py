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


def calibrated(apply: Method, folder: Path, prompt: int) -> Method:
    """Return `apply` with its budget divided among the layers as a calibrate job found.

    Args:
        folder: what that job published.
        prompt: rows of every prompt: a share is of them, and no layer is given more; the sum over
            the layers is exactly that of the uniform budget.

    Raises:
        KvlabError: the folder holds no calibration.
    """
    shares = _shares(folder)
    asked = apply["budget"].params
    assert isinstance(asked, Amount)
    most = prompt if asked.tokens is None else MOST
    tokens = _divided(shares, asked.rows(prompt), least_rows(apply), most)
    params = PerLayerParams(tokens=tokens)
    return Method(apply.label, {**apply.choices, "budget": Choice(ENTRY, params)})


def _shares(folder: Path) -> list[float]:
    try:
        raw: dict[str, Any] = json.loads((folder / FILE).read_bytes())
        return [float(share) for share in raw["budgets"]["shares"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KvlabError(
            f"{folder / FILE}: holds no budgets of a calibrate job ({error})"
        ) from None


def _divided(shares: Sequence[float], rows: int, least: int, most: int) -> tuple[int, ...]:
    """Whole rows whose mean is `rows`, no layer below `least` or above `most`."""
    wanted = torch.tensor([shares], dtype=torch.float64) * rows
    divided = divide(wanted, torch.tensor([rows * len(shares)]), least, most)
    return tuple(int(n) for n in divided[0])
