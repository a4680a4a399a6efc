"""Batched generation over prompts of unequal length, for any language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.graph import Capture, Greedy, capture_on
from kvlab.methods.model import LanguageModel

LOOK_EVERY = 16
"""Steps between two looks at whether all sequences have ended: a look waits for the device."""


class GenerationError(KvlabError):
    """Prompts or sampling settings that nothing can be generated from."""


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
    capture: Callable[[torch.device], Capture | None] = capture_on,
) -> list[list[int]]:
    """Continue each prompt; return the continuations alone.

    Args:
        prompts: token ids, of any lengths. A greedy batch gives what its prompts give one by one.
        new_tokens: at most so many for each.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
        top_k: sample among the k likeliest.
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: of the sampling.
        eos: a continuation ends after this token.
        apply: run-time axes (eviction); None is the full cache.
        capture: what captures greedy steps on a device (see `Greedy`); None: they stay eager.

    Raises:
        GenerationError: an empty prompt, an id outside the vocabulary, an impossible setting.
    """
    _check(model, prompts, new_tokens, temperature, top_k, top_p)
    device = next(model.parameters()).device
    ids, valid = left_pad(prompts, device)
    generator = torch.Generator(device).manual_seed(seed)
    session = model.start(ids, valid, new_tokens=max(0, new_tokens - 1), apply=apply)
    greedy = Greedy(session, capture(device)) if temperature == 0.0 else None
    chosen: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while (count := len(chosen)) < new_tokens:
        if greedy is not None:
            picked = greedy.more(new_tokens - count)
        else:
            if chosen:
                session.step(chosen[-1])
            picked = pick(session.logits, temperature, top_k, top_p, generator).unsqueeze(0)
        chosen.extend(picked.unbind(0))
        if eos is not None:
            ended |= (picked == eos).any(0)
            if len(chosen) // LOOK_EVERY > count // LOOK_EVERY and ended.all():
                break
    rows: list[list[int]] = torch.stack(chosen, 1).tolist() if chosen else [[] for _ in prompts]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def _check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    vocabulary = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise GenerationError(f"prompt {i} is empty: it needs at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise GenerationError(f"prompt {i}: ids must be from 0 to {vocabulary - 1}")
    wrong = {
        "prompts: at least one": not prompts,
        f"new_tokens: at least 0, found {new_tokens}": new_tokens < 0,
        f"temperature: at least 0, found {temperature}": temperature < 0,
        f"top_k: at least 1, found {top_k}": top_k is not None and top_k < 1,
        f"top_p: above 0 and at most 1, found {top_p}": top_p is not None and not 0 < top_p <= 1,
    }
    if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
        raise GenerationError("; ".join(problems))


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
