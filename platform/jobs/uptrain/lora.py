"""LoRA through peft: low-rank additions to the layers' linear maps, merged at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kvlab.methods.model import LanguageModel
from kvlab.platform.jobs.context import JobError


def attach(model: LanguageModel, settings: Mapping[str, Any]) -> Any:
    """Freeze what came from the parent and give linear maps of its layers low-rank additions.

    What a conversion drew or started itself (`LanguageModel.fresh`: encoders, projections, norms)
    trains in full.

    Args:
        model: changed in place.
        settings: rank, alpha, targets (last parts of the names of linear maps; None: all that
            layers took from the parent).

    Returns:
        peft's wrapper, for `merge`.

    Raises:
        JobError: a target that no layer from the parent has.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    fresh = model.fresh
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and in_layer(name)
    ]
    targets = settings["targets"]
    if targets is not None:
        known = sorted({name.rpartition(".")[2] for name in inside})
        if unknown := sorted(set(targets) - set(known)):
            raise JobError(f"lora.targets: no layer has '{unknown[0]}'; it has {', '.join(known)}")
        inside = [name for name in inside if name.rpartition(".")[2] in targets]
    inside = [name for name in inside if f"{name}.weight" not in fresh]
    if not inside:
        raise JobError(
            f"lora.targets: {', '.join(targets or ())} train in full, as the conversion made them "
            "anew: name others too"
        )
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=inside, lora_dropout=0.0
    )
    wrapper = LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if name in fresh:
            parameter.requires_grad_(True)
    return wrapper


def merge(wrapper: Any) -> LanguageModel:
    """Add the low-rank products to the weights and return the plain model."""
    merged: LanguageModel = wrapper.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def in_layer(name: str) -> bool:
    """Say whether a module or parameter stands in a decoder layer."""
    return "layers" in name.split(".")
