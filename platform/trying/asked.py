"""What a person asked `kvlab try` for, read from the command line and checked against the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic_core import PydanticCustomError

from kvlab import KvlabError
from kvlab.platform.jobs.quantities import parse_bytes
from kvlab.platform.trying.points import FEWEST_ROWS, known_names, percent
from kvlab.platform.trying.subject import Subject

Device = Literal["cpu", "cuda"]
PROMPT, GENERATE, SEQUENCES, BATCH = 512, 64, 8, 4
QUICK_PROMPT, QUICK_GENERATE, QUICK_SEQUENCES = 256, 32, 4
SHORTEST = 16
"""Tokens of the shortest prompt from which anything can be left out."""
NAME = re.compile(r"try-.+-[0-9a-f]{8}")
"""What `Asked.name` makes: the names of the workflows of tries."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How a model is to be tried.

    Attributes:
        budgets: shares of a prompt, ascending.
        prompt, generate: tokens of each sequence. sequences: how many are scored; batch: how many
            are timed at once.
        pairs: facts of a prompt that is asked about; 0: none is asked about.
        methods: names of the values that may be used; None: every one.
        prompts: a file of texts; None: Python's own documentation.
    """

    budgets: tuple[float, ...]
    device: Device
    prompt: int
    generate: int
    sequences: int
    batch: int
    pairs: int
    methods: tuple[str, ...] | None = None
    prompts: Path | None = None
    quick: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.generate

    def name(self, subject: Subject) -> str:
        """The workflow's name: equal for equal questions about one folder."""
        digest = sha256(repr((self, str(subject.folder))).encode()).hexdigest()[:8]
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", subject.name).strip("-.")[:40]
        return f"try-{plain or 'model'}-{digest}"


def budgets_of(text: str) -> tuple[float, ...]:
    """Read `10%,20%,50%` as shares, ascending, each once.

    Raises:
        KvlabError: a budget that is no per cent above 0 and at most 100.
    """
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", part)
        if match is None:
            raise KvlabError(
                f"--budget: must be per cents of the full cache such as 10%,20%,50%, found "
                f"'{part.strip()}'"
            )
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise KvlabError(f"--budget: must be above 0 % and at most 100 %, found {part.strip()}")
        found.add(round(share, 6))
    return tuple(sorted(found))


def methods_of(text: str | None) -> tuple[str, ...] | None:
    """Read `a,b`: names of values of the cache's axes.

    Raises:
        KvlabError: a name that is none.
    """
    if text is None:
        return None
    known, found = known_names(), []
    for name in (part.strip() for part in text.split(",")):
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise KvlabError(f"--methods: unknown '{name}': {hint}known: {', '.join(known)}")
        found.append(name)
    return tuple(dict.fromkeys(found))


def memory_of(text: str | None) -> int | None:
    """Read `24GiB` as bytes.

    Raises:
        KvlabError: no such quantity.
    """
    if text is None:
        return None
    try:
        found = parse_bytes(int(text) if text.isdigit() else text)
    except PydanticCustomError as error:
        raise KvlabError(f"--memory: {error.message()}, found '{text}'") from None
    if found < 1:
        raise KvlabError(f"--memory: must be at least 1 byte, found '{text}'")
    return found


def lengths(
    subject: Subject, prompt: int | None, generate: int | None, quick: bool, held: int | None
) -> tuple[int, int]:
    """Return the tokens of a prompt and of what follows it: as asked, else what fits.

    Args:
        held: tokens that the person's own text has; None: as many as are wanted.

    Raises:
        KvlabError: more than the model's positions, or than the text.
    """
    most, span = subject.config.max_positions, subject.span
    after = generate or min(QUICK_GENERATE if quick else GENERATE, max(1, most // 4))
    if generate is not None and SHORTEST * span <= most < SHORTEST * span + after:
        raise KvlabError(
            f"--generate: {after} tokens after a prompt of {SHORTEST * span} or more are more than "
            f"the model's {most} positions: give {most - SHORTEST * span} or fewer"
        )
    if prompt is not None:
        if prompt + after > most:
            raise KvlabError(
                f"--prompt: {prompt} tokens and {after} generated are more than the model's "
                f"{most} positions: give {most - after} or fewer"
            )
        before = prompt
    else:
        before = min(QUICK_PROMPT if quick else PROMPT, most - after)
        if held is not None:
            before = min(before, held - after)
        before -= before % span
    if held is not None and before + after > held:
        raise KvlabError(
            f"--prompts: its text has {held} tokens, one prompt and what follows it take "
            f"{before + after}: give more text, or a smaller --prompt and --generate"
        )
    if before < SHORTEST * span:
        raise KvlabError(
            f"--prompt: must be at least {SHORTEST * span} tokens, found {before}: "
            f"the model has {most} positions and {after} are generated"
        )
    if before % span or (before + after) % span:
        raise KvlabError(
            f"--prompt: {before} and --generate {after} must be multiples of the model's block "
            f"length, {span}"
        )
    return before, after


def check_budgets(budgets: Sequence[float], prompt: int, span: int) -> None:
    """Refuse budgets that leave no room for sinks.

    Raises:
        KvlabError: naming the smallest that does.
    """
    rows = prompt // span
    for share in budgets:
        if int(share * rows) < FEWEST_ROWS:
            least = -(-1000 * FEWEST_ROWS // rows) / 1000
            raise KvlabError(
                f"--budget: {percent(share)} of a prompt of {prompt} tokens is "
                f"{int(share * rows)} of {rows} rows, and fewer than {FEWEST_ROWS} have no room "
                f"for sinks: give {percent(least)} or more, or a longer --prompt"
                if least <= 1
                else f"--prompt: {prompt} tokens are too few to leave any out"
            )
