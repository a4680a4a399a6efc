"""The decoder's parts by the kernels that vLLM has for a CPU: packed, and several in one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from kvlab.methods.decoder.layers import FeedForward, RMSNorm
from kvlab.methods.decoder.model import Decoder

WHOLE = 64
"""Numbers that a row must be a multiple of for the norm's kernel, whatever their type."""


class Packed(nn.Module):
    """A linear map whose weight lies as vLLM's CPU kernels want it; nothing else is left of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = self.cpu_linear
        out: Tensor = kernel(x, self.weight, self.bias)
        return out


class GatedUp(nn.Module):
    """down(silu(gate x) * up x), the two maps in front as one."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        assert plain.gate is not None
        weight = torch.cat((plain.gate.weight.detach(), plain.up.weight.detach()))
        bias = None
        if plain.gate.bias is not None and plain.up.bias is not None:
            bias = torch.cat((plain.gate.bias.detach(), plain.up.bias.detach()))
        self.gate_up = Packed(weight, bias)
        self.down = plain.down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate).mul_(up))
        return out


class Normed(nn.Module):
    """`RMSNorm` in one kernel."""

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = plain.weight, plain.eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, self.weight, self.eps)
        return out


def pack(model: nn.Module) -> None:
    """Put these in the place of a model's parts on a CPU; elsewhere torch's own are as fast."""
    if next(model.parameters()).device.type != "cpu":
        return
    for decoder in [module for module in model.modules() if isinstance(module, Decoder)]:
        if decoder.output is None and decoder.embedding is not None:  # a tied head: a copy, packed
            table = decoder.embedding.weight
            decoder.output = nn.Linear(table.shape[1], table.shape[0], bias=False, device="meta")
            decoder.output.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, FeedForward) and module.gate and module.activation == "silu":
            model.set_submodule(name, GatedUp(module))
        elif isinstance(module, RMSNorm) and len(module.weight) % WHOLE == 0:
            model.set_submodule(name, Normed(module))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, Packed(module.weight.detach(), bias))
