"""How much each layer's attention does, measured as a cache watches it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.similarity import residual_cosine


class Importance:
    """Adds up, for every decoder layer, what a budget wants to know of it.

    Args: wanted: "cosine" or "mass" (see `Budget.importance`); anything else measures nothing.

    Attributes:
        steps: passes since the last `reset`.
    """

    def __init__(self, wanted: str | None) -> None:
        self._wanted = wanted
        self._sums: dict[int, Tensor] = {}
        self.steps = 0

    def see(
        self,
        layer: int,
        before: Tensor,
        after: Tensor,
        key_mass: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        """Measure one layer in one pass: see `Cache.observe`; valid [B, T], None: all rows are."""
        if self._wanted == "cosine":
            found = mean_cosine(before, after, valid)
        elif self._wanted == "mass":  # a layer that finds no keys yet attends to nothing
            nothing = before.new_zeros(len(before), dtype=torch.float32)
            found = nothing if key_mass is None else spread(key_mass)
        else:
            return
        if layer == 0:
            self.steps += 1
        self._sums[layer] = self._sums[layer] + found if layer in self._sums else found

    def reset(self) -> None:
        self._sums.clear()
        self.steps = 0

    def cosines(self, layers: int) -> Tensor | None:
        return self._means(layers) if self._wanted == "cosine" else None

    def spread(self, layers: int) -> Tensor | None:
        return self._means(layers) if self._wanted == "mass" else None

    def state(self) -> dict[str, Tensor]:
        found = {f"importance.{layer}": tensor for layer, tensor in self._sums.items()}
        return {**found, "importance.steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        self.steps = int(state["importance.steps"])
        names = [name for name in state if name.startswith("importance.") and name[11:].isdigit()]
        self._sums = {int(name[11:]): state[name].to(device, copy=True) for name in names}

    def _means(self, layers: int) -> Tensor | None:
        """[B, layers] float64 on the CPU: the one time that the device is waited for."""
        if len(self._sums) < layers:
            return None
        sums = torch.stack([self._sums[layer] for layer in range(layers)], dim=1)
        return sums.double().cpu() / self.steps


def mean_cosine(before: Tensor, after: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the rows [B] float32 of the cosine between [B, T, W] before and after attention.

    Args: valid: [B, T], rows that count; None: all.
    """
    cosines = residual_cosine(before, after)
    if valid is None:
        return cosines.mean(1)
    return (cosines * valid).sum(1) / valid.sum(1).clamp_min(1)


def spread(key_mass: Tensor) -> Tensor:
    """How evenly keys are attended to [B] float32, from their attention [B, H, S]: 1 is evenly.

    The entropy of each head's attention over the keys, divided by that of attending to all alike;
    the mean over the heads.
    """
    shares = key_mass / key_mass.sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1)
    keys = (key_mass > 0).sum(-1).clamp_min(2)
    return (entropy / keys.log()).mean(1)
