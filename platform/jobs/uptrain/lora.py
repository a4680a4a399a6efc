"""LoRA through peft: low-rank additions to the layers' linear maps, merged at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kvlab.methods.model import LanguageModel
from kvlab.platform.jobs.context import JobError


def attach(model: LanguageModel, settings: Mapping[str, Any]) -> Any:
    """Freeze the model's layers and tables and give linear maps of its layers low-rank additions.

    What belongs to neither (a conversion's new projections, norms outside the layers) trains in
    full: a conversion may start it from a mere identity.

    Args:
        model: changed in place.
        settings: rank, alpha, targets (last parts of the names of linear maps; None: all there
            are in layers).

    Returns:
        peft's wrapper, for `merge`.

    Raises:
        JobError: a target that no layer has.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    inside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and in_layer(n)]
    targets = settings["targets"]
    if targets is not None:
        known = sorted({name.rpartition(".")[2] for name in inside})
        if unknown := sorted(set(targets) - set(known)):
            raise JobError(f"lora.targets: no layer has '{unknown[0]}'; it has {', '.join(known)}")
        inside = [name for name in inside if name.rpartition(".")[2] in targets]
    whole = [n for n, p in model.named_parameters() if not in_layer(n) and not _table(model, p)]
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=inside, lora_dropout=0.0
    )
    wrapper = LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if name in whole:
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


def _table(model: LanguageModel, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 and model.config.vocab_size in parameter.shape
