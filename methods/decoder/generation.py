"""Batched generation over prompts of unequal length, for any language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.model import LanguageModel


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | None = None,
    apply: Method | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `new_tokens` tokens; return the continuations alone."""
    device = next(model.parameters()).device
    ids, valid = left_pad(prompts, device)
    generator = torch.Generator(device).manual_seed(seed)
    session = model.start(ids, valid, new_tokens=max(0, new_tokens - 1), apply=apply)
    chosen: list[Tensor] = []
    for step in range(new_tokens):
        if step:
            session.step(chosen[-1])
        chosen.append(pick(session.logits, temperature, top_k, top_p, generator))
    rows: list[list[int]] = torch.stack(chosen, 1).tolist() if chosen else [[] for _ in prompts]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def left_pad(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return ids [B, T] and valid [B, T] (None when all prompts are equally long)."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == longest for p in prompts):
        return ids, None
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(longest, device=device) >= longest - lengths[:, None]


def pick(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Choose the next token [B] from logits [B, V]; temperature 0 is greedy."""
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if top_k is not None:
        lowest = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < lowest, float("-inf"))
    if top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= top_p
        scaled = scaled.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(1)
