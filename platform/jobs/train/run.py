"""The train job: a fresh model, or a checkpoint people have, trained on the data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvlab.methods.build import build, convert
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import from_dict
from kvlab.methods.store import load, save
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.context import Context
from kvlab.platform.jobs.training.gang import join
from kvlab.platform.jobs.training.loop import Training, rows_of
from kvlab.platform.jobs.training.objective import Objective


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Publish the trained model (model.safetensors, model.json) beside its tokenizer.json.

    Raises:
        Diverged, Stopped: see `Training.run`.
        KvlabError: the model, the data and the spec do not fit together.
    """
    device = environment.prepare(context, spec["seed"])
    if not spec["tokens"] and (taken := _as_it_is(spec)) is not None:
        return _publish_taken(taken, context)
    with join(context) as gang:
        model = _model(spec).to(device)
        objective = Objective(model)
        result = Training(objective, rows_of(model, spec, context), spec, context, gang).run()
        return publish(model, result, context)


def _model(spec: Mapping[str, Any]) -> LanguageModel:
    method = from_dict(spec["method"])
    if "config" in spec["model"]:
        return build(DecoderConfig.from_dict(dict(spec["model"]["config"])), method)
    # Whatever a checkpoint is stored in, weights and moments are float32; autocast does the rest.
    found = load(Path(spec["model"]["checkpoint"]), dtype=torch.float32)
    return found if found.method.to_dict() == method.to_dict() else convert(found, method)


def _as_it_is(spec: Mapping[str, Any]) -> LanguageModel | None:
    """A checkpoint that nothing is to be done to, in its own dtype; None: it is to be converted."""
    from kvlab.platform.jobs.checkpoint import trained_method

    if trained_method(Path(spec["model"]["checkpoint"])) != spec["method"]:
        return None
    return load(Path(spec["model"]["checkpoint"]))


def _publish_taken(model: LanguageModel, context: Context) -> dict[str, Any]:
    if context.rank == 0:
        save(model, context.folder)
        shutil.copy(context.inputs["data"] / "tokenizer.json", context.folder)
    return {
        "loss": None,
        "tokens": 0,
        "targets": 0,
        "steps": 0,
        "seconds": 0.0,
        "tokens_per_second": None,
        "flops": 0.0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "body_parameters": model.body_parameters(),
        "environment": environment.capture(context),
    }


def publish(model: LanguageModel, result: dict[str, Any], context: Context) -> dict[str, Any]:
    """Write the model's folder (rank 0) and return the whole result."""
    from kvlab.platform.jobs.training.gang import whole

    tensors = {name: whole(t) for name, t in model.state_dict().items()}
    counted = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "body_parameters": model.body_parameters(),
        "environment": environment.capture(context),
    }
    if context.rank == 0:
        plain = build(model.config, model.method)
        plain.load_state_dict(tensors)
        save(plain, context.folder)
        shutil.copy(context.inputs["data"] / "tokenizer.json", context.folder)
    return {**result, **counted}
