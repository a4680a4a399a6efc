"""Linear maps by the kernels that vLLM has for a CPU: weights packed once, after loading."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from kvlab.methods.decoder.model import Decoder


class Packed(nn.Module):
    """A linear map whose weight lies as vLLM's CPU kernels want it; nothing else is left of it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.bias = plain.bias
        self.weight = plain.weight
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = self.cpu_linear
        out: Tensor = kernel(x, self.weight, self.bias)
        return out


def pack(model: nn.Module) -> None:
    """Pack the linear maps of a model on a CPU; on other devices torch's own are vLLM's too."""
    for decoder in [module for module in model.modules() if isinstance(module, Decoder)]:
        if decoder.output is None and decoder.embedding is not None:  # a tied head: a copy, packed
            table = decoder.embedding.weight
            decoder.output = nn.Linear(table.shape[1], table.shape[0], bias=False, device="meta")
            decoder.output.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            model.set_submodule(name, Packed(module))
