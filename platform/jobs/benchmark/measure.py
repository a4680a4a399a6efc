"""One generation, timed: prefill and decode apart, and what the live cache held at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.model import LanguageModel


@dataclass(frozen=True, slots=True)
class Generation:
    """What one generation of a batch took and held.

    Attributes:
        prefill: seconds from the prompts to the logits of the first token.
        first_token: seconds from the prompts to the first token itself.
        decode: seconds from the first token to the last.
        kv_bytes, kv_tokens: storages of the live cache after the last token, and the tokens in it.
        ids: [B, generated], what was generated.
    """

    prefill: float
    first_token: float
    decode: float
    kv_bytes: int
    kv_tokens: int
    ids: Tensor


def generate(
    model: LanguageModel, prompts: Tensor, new_tokens: int, apply: Method | None
) -> Generation:
    """Prefill prompts [B, T] and generate greedily, never ending early."""
    device = prompts.device
    _settle(device)
    begun = time.perf_counter()
    session = model.start(prompts, new_tokens=new_tokens, apply=apply)
    _settle(device)
    prefilled = time.perf_counter()
    tokens = [session.logits.argmax(-1)]
    _settle(device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        tokens.append(session.step(tokens[-1]).argmax(-1))
    _settle(device)
    last = time.perf_counter()
    session.step(tokens[-1])  # not timed: the cache then holds all that was generated
    return Generation(
        prefill=prefilled - begun,
        first_token=first - begun,
        decode=last - first,
        kv_bytes=session.kv_bytes(),
        kv_tokens=session.kv_tokens(),
        ids=torch.stack(tokens, dim=1),
    )


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
