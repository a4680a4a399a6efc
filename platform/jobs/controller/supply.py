"""The controller that a job was given, as a parameter of its method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kvlab.methods.axis import Choice, Method


def supplied(apply: Method, folder: Path) -> Method:
    """Return `apply` with the controller that a job published."""
    eviction = apply["eviction"]
    params: Any = replace(eviction.params, controller=str(folder))
    return Method(apply.label, {**apply.choices, "eviction": Choice(eviction.value, params)})
