"""Run-time choices with what other jobs prepared for them; see `given`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvlab.methods.axis import Method
from kvlab.methods.registry import from_dict
from kvlab.platform.jobs.context import Context


def applied(spec: Mapping[str, Any], context: Context, rows: int) -> Method:
    """Return what a job's `apply` stands for, its controller and its budgets filled in.

    Args: rows: of a prompt, in positions; budgets are divided for prompts of so many.
    """
    method = from_dict(spec["apply"])
    if spec.get("controller"):
        from kvlab.platform.jobs.controller.supply import supplied

        method = supplied(method, context.inputs["controller"])
    if spec.get("budgets"):
        from kvlab.platform.jobs.calibrate.fixed import calibrated

        method = calibrated(method, context.inputs["budgets"], rows)
    return method
