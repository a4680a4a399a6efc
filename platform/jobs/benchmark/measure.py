"""One generation, timed: prefill and decode apart, and what the live cache held at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.decoder.graph import Capture, Greedy, settle
from kvlab.methods.model import LanguageModel


@dataclass(frozen=True, slots=True)
class Generation:
    """What one generation of a batch took and held.

    Attributes:
        prefill: seconds from the prompts to the logits of the first token.
        first_token: seconds from the prompts to the first token itself.
        decode: seconds from the first token to the last, without those of `captured`: a server
            captures once, and a generation of any length has one capture.
        captured: seconds that capturing a decode step took. replayed: share of the decode steps
            that were replays of it; None where there was no step.
        kv_bytes, kv_tokens: storages of the live cache after the last token, and the tokens in it.
        ids: [B, generated], what was generated.
    """

    prefill: float
    first_token: float
    decode: float
    captured: float
    replayed: float | None
    kv_bytes: int
    kv_tokens: int
    ids: Tensor


def generate(
    model: LanguageModel,
    prompts: Tensor,
    new_tokens: int,
    apply: Method | None,
    capture: Capture | None = None,
) -> Generation:
    """Prefill prompts [B, T] and generate greedily, never ending early.

    Args: capture: what captures decode steps, see `Greedy`; None: all are eager.
    """
    device = prompts.device
    settle(device)
    begun = time.perf_counter()
    session = model.start(prompts, new_tokens=new_tokens, apply=apply)
    settle(device)
    prefilled = time.perf_counter()
    greedy = Greedy(session, capture)
    tokens = list(greedy.more(1))
    settle(device)
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        tokens.extend(greedy.more(new_tokens - len(tokens)))
    settle(device)
    last = time.perf_counter()
    session.step(tokens[-1])  # not timed: the cache then holds all that was generated
    return Generation(
        prefill=prefilled - begun,
        first_token=first - begun,
        decode=last - first - greedy.seconds,
        captured=greedy.seconds,
        replayed=greedy.replayed / (new_tokens - 1) if new_tokens > 1 else None,
        kv_bytes=session.kv_bytes(),
        kv_tokens=session.kv_tokens(),
        ids=torch.stack(tokens, dim=1),
    )
