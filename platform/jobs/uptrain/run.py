"""The uptrain job: a trained model converted to a method, and trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvlab.methods.build import convert
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import from_dict
from kvlab.methods.store import load
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.context import Context, JobError
from kvlab.platform.jobs.train.run import publish
from kvlab.platform.jobs.training.gang import join
from kvlab.platform.jobs.training.loop import Training, rows_of
from kvlab.platform.jobs.training.objective import Objective, Sparse
from kvlab.platform.jobs.uptrain import lora


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Publish the uptrained model, as the train job does.

    Args:
        spec: of a train job without `model`, and `lora`, `distill`, `sparse`. Parents: "from",
            "data", and "teacher" where it is not the parent that is learnt from.

    Raises:
        Diverged, Stopped: see `Training.run`.
        KvlabError: the parent cannot be converted, or the parts do not fit together.
    """
    device = environment.prepare(context, spec["seed"])
    with join(context) as gang:
        parent = load(context.inputs["from"], dtype=torch.float32)
        model = convert(parent, from_dict(spec["method"])).to(device)
        adapter = lora.attach(model, spec["lora"]) if spec["lora"] else None
        sparse = Sparse(**spec["sparse"]) if "sparse" in spec else None
        teacher = _teacher(context, model).to(device) if spec["distill"] or sparse else None
        objective = Objective(model, teacher, **(spec["distill"] or {}), sparse=sparse)
        result = Training(objective, rows_of(model, spec, context), spec, context, gang).run()
        if adapter is not None:
            model = lora.merge(adapter)
        return publish(model, result, context)


def _teacher(context: Context, student: LanguageModel) -> LanguageModel:
    teacher = load(context.inputs.get("teacher", context.inputs["from"]))
    if teacher.config.vocab_size != student.config.vocab_size:
        raise JobError(
            f"the teacher's vocabulary ({teacher.config.vocab_size}) must equal the model's "
            f"({student.config.vocab_size})"
        )
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher.eval()
