"""Recall tasks as prompts: facts among filler, and a question about one of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

from kvlab.platform.jobs.context import JobError
from kvlab.platform.jobs.evaluate.language import Language

PASSKEY, ASSOCIATIVE = "passkey", "associative_recall"
TASKS = (PASSKEY, ASSOCIATIVE)
"""One fact in filler (Mohtashami & Jaggi, arXiv 2305.16300), and several of which one is asked for
(the retrieval half of Arora et al., arXiv 2312.04927; RULER's multi-key needles, 2404.06654)."""


class Place(NamedTuple):
    """A cell: the task, the tokens of context and question, the depth of the fact asked for.

    depth: 0 is the beginning of the context, 1 its end.
    """

    task: str
    length: int
    depth: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """A context, a question about it, and its answer; token ids, but for an answer in text."""

    place: Place
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: str | tuple[int, ...]


def prompts(spec: Mapping[str, Any], language: Language) -> list[Prompt]:
    """Return the seeded prompts of every cell, `samples` each, by task, length and depth.

    Args:
        spec: tasks, lengths, depths, pairs (facts of an associative prompt), samples, seed.

    Raises:
        JobError: a length that does not hold the facts.
    """
    return [
        _prompt(Place(task, length, depth), sample, spec, language)
        for task in spec["tasks"]
        for length in spec["lengths"]
        for depth in spec["depths"]
        for sample in range(spec["samples"])
    ]


def digest(chosen: Sequence[Prompt]) -> str:
    """Return the hash that two results share exactly when they were asked the same."""
    found = sha256()
    for prompt in chosen:
        found.update(repr((prompt.context, prompt.question, prompt.answer)).encode())
    return found.hexdigest()


def _prompt(place: Place, sample: int, spec: Mapping[str, Any], language: Language) -> Prompt:
    # Cells that differ in depth alone have the same facts and filler.
    draw = random.Random(f"{spec['seed']} {place.task} {place.length} {sample}")
    count = 1 if place.task == PASSKEY else spec["pairs"]
    if count > language.most:
        raise JobError(f"recall.pairs: a prompt holds at most {language.most} facts, found {count}")
    facts = language.facts(draw, count)
    asked = facts[round(place.depth * (count - 1))]
    taken = len(language.opening) + len(asked.question) + sum(len(fact.said) for fact in facts)
    if taken > place.length:
        raise JobError(
            f"recall.lengths: {place.length} tokens do not hold {count} fact(s) and a question, "
            f"which take {taken}: give longer lengths or fewer pairs"
        )
    depths = [place.depth] if count == 1 else [i / (count - 1) for i in range(count)]
    said = [fact.said for fact in facts]
    context = _between(said, depths, place.length - taken, language, draw)
    return Prompt(place, (*language.opening, *context), tuple(asked.question), asked.answer)


def _between(
    facts: Sequence[Sequence[int]],
    depths: Sequence[float],
    room: int,
    language: Language,
    draw: random.Random,
) -> list[int]:
    """Put each fact between the two pieces of filler nearest to its depth; fill `room` exactly."""
    filler: list[int] = []
    edges = [0]
    while edges[-1] < room:
        filler.extend(language.filler(draw))
        edges.append(min(len(filler), room))
    text: list[int] = []
    begun = 0
    for fact, depth in zip(facts, depths, strict=True):
        edge = min(edges, key=lambda at: abs(at - depth * room))
        text += [*filler[begun:edge], *fact]
        begun = edge
    return [*text, *filler[begun:room]]
