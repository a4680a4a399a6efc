"""LoRA through peft: low-rank additions to the layers' linear maps, merged at the end.

With `quantize` the frozen maps are held in 4 bits meanwhile (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            layers took from the parent), quantize (nf4 or fp4: the maps with additions are held so;
            None: as they are).

    Returns:
        peft's wrapper, for `merge`.

    Raises:
        JobError: a target that no layer from the parent has; bitsandbytes is not installed.
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
    if settings["quantize"] is not None:
        _quantize(model, inside, settings["quantize"])
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=inside, lora_dropout=0.0
    )
    wrapper = LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if name in fresh:
            parameter.requires_grad_(True)
    return wrapper


def merge(wrapper: Any) -> LanguageModel:
    """Add the low-rank products to the weights and return the plain model.

    To weights in 4 bits as training read them: what was learned makes up for their rounding.
    """
    _restore(wrapper)
    merged: LanguageModel = wrapper.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def _quantize(model: LanguageModel, names: Sequence[str], kind: str) -> None:
    """Hold linear maps in 4 bits, on the device where they are."""
    try:
        from bitsandbytes import nn as quantised
    except ImportError:
        raise JobError(
            "lora.quantize: needs bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from None
    for name in names:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        bias = plain.bias is not None
        made: Any = quantised.Linear4bit
        held = made(plain.in_features, plain.out_features, bias=bias, quant_type=kind)
        held.load_state_dict(plain.state_dict())
        model.set_submodule(name, held.to(plain.weight.device).requires_grad_(False))


def _restore(wrapper: Any) -> None:
    """Turn maps in 4 bits into plain ones of the same values, where there are any."""
    for layer in list(wrapper.modules()):
        held = getattr(layer, "base_layer", None)
        state = getattr(getattr(held, "weight", None), "quant_state", None)
        if held is None or state is None:
            continue
        from bitsandbytes.functional import dequantize_4bit

        plain = nn.Linear(held.in_features, held.out_features, bias=held.bias is not None)
        plain.weight.data = dequantize_4bit(held.weight.data, state).float()
        if held.bias is not None:
            plain.bias.data = held.bias.data
        layer.base_layer = plain


def in_layer(name: str) -> bool:
    """Say whether a module or parameter stands in a decoder layer."""
    return "layers" in name.split(".")
