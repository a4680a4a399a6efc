"""From a command line to a try that can run: everything is checked here, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.platform.spec import machine
from kvlab.platform.trying import asked as limits
from kvlab.platform.trying import device as devices
from kvlab.platform.trying import text
from kvlab.platform.trying.asked import Asked, check_budgets, lengths
from kvlab.platform.trying.points import Candidates, itemsize_of
from kvlab.platform.trying.subject import Subject, read

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE = 1 << 30
"""Bytes of weights from which a job has all CPUs: two models at once would not be faster."""
SEED = 0


@dataclass(frozen=True, slots=True)
class Question:
    """What was written on the command line; None: what fits the model."""

    budgets: tuple[float, ...]
    methods: tuple[str, ...] | None
    memory: int | None
    prompts: Path | None
    device: str | None
    prompt: int | None
    generate: int | None
    sequences: int | None
    batch: int
    quick: bool

    def about(self, folder: Path, name: str) -> Made:
        """Ask it about the model in a folder.

        Raises:
            KvlabError: a model that cannot be used, or a question that it cannot answer.
        """
        device = devices.choose(self.device)
        subject = read(folder, Path(name).name or folder.absolute().name)
        column = held = None
        if self.prompts is not None:
            if not subject.tokenizer:
                raise KvlabError(
                    f"--prompts: the model has no usable tokenizer: {subject.why}; "
                    "without --prompts it is tried on token ids"
                )
            column = text.column_of(self.prompts)
            held = text.count(self.prompts, column, subject)
        before, after = lengths(subject, self.prompt, self.generate, self.quick, held)
        check_budgets(self.budgets, before, subject.span)
        wanted = self.sequences or (limits.QUICK_SEQUENCES if self.quick else limits.SEQUENCES)
        found = wanted if held is None else max(1, min(wanted, held // (before + after)))
        asked = Asked(
            budgets=self.budgets,
            device=device,
            prompt=before,
            generate=after,
            sequences=found,
            batch=self.batch,
            pairs=text.pairs(subject, before) if subject.tokenizer else 0,
            methods=self.methods,
            prompts=None if self.prompts is None else self.prompts.absolute(),
            quick=self.quick,
        )
        candidates = Candidates(
            subject, before, before + after, self.budgets, itemsize_of(device), self.methods
        )
        _refuse_misfits(candidates, asked)
        memory = self.memory or devices.memory(device)
        return Made(subject, asked, candidates, memory, column)


def _refuse_misfits(candidates: Candidates, asked: Asked) -> None:
    """Refuse a question that no value fits, or that names one that does not or is of no use alone.

    Raises:
        KvlabError: naming what does not fit, and why.
    """
    if asked.methods is not None and candidates.budgets:
        cure = "leave out --quick" if candidates.evictions else "name an eviction as well"
        if asked.quick or not candidates.evictions:
            raise KvlabError(
                f"--methods: {candidates.budgets[0].name} divides what an eviction keeps, so it is "
                f"tried in compositions alone: {cure}"
            )
    points = candidates.singles()
    if not points or (asked.methods is not None and candidates.left_out):
        why = next(iter(candidates.left_out), "no method is left")
        raise KvlabError(f"--{'methods' if asked.methods else 'budget'}: {why}")


@dataclass(frozen=True, slots=True)
class Made:
    """A question about a model that was found fit to be answered."""

    subject: Subject
    asked: Asked
    candidates: Candidates
    memory: int
    column: str | None

    @property
    def name(self) -> str:
        return self.asked.name(self.subject)

    def cpus(self, room: int | None) -> int:
        """CPUs of a job that is not timed."""
        heavy = self.subject.weight_bytes(itemsize_of(self.asked.device)) >= LARGE
        return (room or machine.cpus()) if heavy else 1

    def data(self, place: Callable[[], Path]) -> Mapping[str, Any]:
        """The workflow's `data:`; `place` makes the folder for what has to be written for it."""
        tokens = self.asked.sequences * self.asked.length
        if not self.subject.tokenizer:
            return text.token_source(place(), self.subject, tokens, SEED)
        if self.asked.prompts is not None:
            return text.own_source(self.asked.prompts, self.column)
        return text.python_source(tokens)
