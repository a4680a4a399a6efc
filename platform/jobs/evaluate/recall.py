"""What a model still finds in its past once the cache was cut: accuracy by depth and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.model import LanguageModel
from kvlab.platform.jobs.context import Context, JobError, Stopped
from kvlab.platform.jobs.evaluate.language import Language, language_of
from kvlab.platform.jobs.evaluate.prompts import Place, Prompt, digest, prompts

Asked = Literal["in_prompt", "after_cut"]
WAYS: dict[str, Asked] = {"recall": "in_prompt", "multi_turn": "after_cut"}
"""Metric -> how the question is asked: at the prompt's end, or in a turn of its own, when the cache
of the context was cut."""
Answering = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""From prompts and a number of tokens to greedy answers."""
Cut = Callable[[int], Method]
"""The run-time axes for prompts of so many tokens."""
STANDS = 0.95
"""A cell whose full cache answers fewer than this share says nothing about a cut one."""


def measure(
    model: LanguageModel,
    data: Path,
    cut: Cut | None,
    spec: Mapping[str, Any],
    metrics: Sequence[str],
    batch_size: int,
    device: torch.device,
    context: Context,
    answer: Answering | None = None,
) -> dict[str, Any]:
    """Ask the same questions under the cache of `cut` and under the full one.

    Args:
        data: the folder of the data job. metrics: those of `WAYS` that are wanted.
        cut: None: the full cache is asked alone.
        answer: who answers under the cache of `cut`, in the model's place.
        spec: as `prompts` takes it, and answer (words of one, where words are symbols).

    Returns:
        metric -> its part of the result; see `summarise`.

    Raises:
        JobError: prompts that cannot be made as asked, or that hold ids the model does not know.
    """
    language = language_of(data, spec["answer"])
    asked = prompts(spec, language)
    known = model.config.vocab_size
    if any(max(p.context + p.question) >= known for p in asked):
        raise JobError(f"recall: a prompt holds ids beyond the model's vocabulary ({known})")
    wanted = [(name, way) for name, way in WAYS.items() if name in metrics]
    caches = (None,) if cut is None else (None, cut)
    others = {0: None, len(caches) - 1: answer}
    total, done = len(asked) * len(wanted) * len(caches), 0
    result = {}
    for name, way in wanted:
        answers = []
        for number, cache in enumerate(caches):
            right = torch.zeros(len(asked), dtype=torch.bool)
            for numbers, found in _answers(
                model, asked, language, way, cache, batch_size, device, others[number]
            ):
                right[numbers] = found
                done += len(numbers)
                if context.stopping():
                    raise Stopped
                context.progress(done, total, "questions")
            answers.append(right)
        result[name] = summarise(asked, answers[0], answers[-1], spec["samples"])
    return result


def _answers(
    model: LanguageModel,
    asked: Sequence[Prompt],
    language: Language,
    way: Asked,
    cut: Cut | None,
    batch_size: int,
    device: torch.device,
    answer: Answering | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers [B] of prompts and whether each was answered right [B].

    Only prompts of one shape share a batch, so none is padded.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, prompt in enumerate(asked):
        shapes.setdefault((len(prompt.context), len(prompt.question)), []).append(number)
    for (context, question), alike in shapes.items():
        prompt_tokens = context + question if way == "in_prompt" else context
        apply = None if cut is None else cut(prompt_tokens)
        for numbers in torch.split(torch.tensor(alike), batch_size):
            batch = [asked[number] for number in numbers]
            if answer is None:
                generated = _generate(model, batch, language.answer_tokens, way, apply, device)
            else:
                whole = [prompt.context + prompt.question for prompt in batch]
                generated = answer(whole, language.answer_tokens)
            found = [
                language.right(ids, prompt.answer)
                for ids, prompt in zip(generated, batch, strict=True)
            ]
            yield numbers, torch.tensor(found)


@torch.inference_mode()
def _generate(
    model: LanguageModel,
    batch: Sequence[Prompt],
    tokens: int,
    way: Asked,
    apply: Method | None,
    device: torch.device,
) -> list[list[int]]:
    contexts = torch.tensor([prompt.context for prompt in batch], device=device)
    questions = torch.tensor([prompt.question for prompt in batch], device=device)
    if way == "in_prompt":
        whole = torch.cat((contexts, questions), dim=1)
        session = model.start(whole, new_tokens=tokens - 1, apply=apply)
    else:
        rows = questions.shape[1] + tokens - 1
        session = model.start(contexts, new_tokens=rows, apply=apply)
        session.extend(questions, new_tokens=tokens - 1)
    chosen = [session.logits.argmax(-1)]
    for _ in range(tokens - 1):
        chosen.append(session.step(chosen[-1]).argmax(-1))
    ids: list[list[int]] = torch.stack(chosen, 1).tolist()
    return ids


def summarise(
    asked: Sequence[Prompt], full: Tensor, applied: Tensor, samples: int
) -> dict[str, Any]:
    """Return accuracies by cell; only cells that stand are part of the mean.

    Args:
        asked: N prompts, cell by cell, `samples` each. full, applied: [N] bool, right answers.

    Returns:
        accuracy and full_accuracy (over cells that stand; None where none does), cells (task,
        length, depth, accuracy, full_accuracy, void: why the cell does not count, else null),
        answers (of the prompts that stand, in order: 1 or 0), prompts (hash and count of those).
    """
    cells: list[dict[str, Any]] = []
    standing: list[int] = []
    for start in range(0, len(asked), samples):
        numbers = range(start, start + samples)
        share, reference = (
            _share(applied[start : start + samples]),
            _share(full[start : start + samples]),
        )
        void = None
        if reference < STANDS:
            void = f"the full cache answers {reference:.0%}, under {STANDS:.0%}"
        else:
            standing.extend(numbers)
        place: Place = asked[start].place
        cells.append(
            {**place._asdict(), "accuracy": share, "full_accuracy": reference, "void": void}
        )
    return {
        "accuracy": _share(applied[standing]) if standing else None,
        "full_accuracy": _share(full[standing]) if standing else None,
        "prompts": {"hash": digest([asked[i] for i in standing]), "count": len(standing)},
        "cells": cells,
        "answers": applied[standing].int().tolist(),
    }


def _share(right: Tensor) -> float:
    return float(right.double().mean())
