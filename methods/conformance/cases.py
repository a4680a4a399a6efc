"""What is put to the test: a method on a tiny decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.axis import TRAIN_TIME, Choice, Method, MethodError
from kvlab.methods.budget.amount import Amount
from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.config import DecoderConfig, Sharing, llama
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.registry import misfits, refuse_misfits, resolve

VOCABULARY = 53
DECODERS: dict[str, dict[str, Any]] = {
    "mha": llama(32, 2, 4, 4, 48),
    "gqa": llama(32, 2, 4, 2, 48, qk_norm=True),
    "windows": llama(32, 3, 4, 2, 48, windows=(9, None, 9)),
    "shared": llama(32, 3, 4, 2, 48, sharing=Sharing((0, 1, 1))),
    "upward": llama(32, 3, 4, 2, 48, sharing=Sharing((0, 2, 2))),
}
"""One key head for each query head; groups; windows of the model's own; shared KV layers, read from
above them, and from below."""
WIDE = llama(32, 2, 4, 4, 16, head_dim=128)
"""Rows so wide that tables beside them count for little."""
LONGEST = 256
"""Tokens of the longest text that is tried to make a method let go of something."""


class UnfitError(MethodError):
    """A method that a decoder cannot have, or that is none of run time."""


@dataclass(frozen=True, slots=True)
class Case:
    """A method on one of `DECODERS`."""

    method: Method
    decoder: str

    @property
    def name(self) -> str:
        return f"{self.method.label}-{self.decoder}"

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(VOCABULARY, **DECODERS[self.decoder])

    def check(self) -> None:
        """Raise an UnfitError where the method and the decoder do not go together."""
        refuse(self.method, self.config)

    def model(self, dtype: torch.dtype = torch.float32) -> Decoder:
        return decoder(self.config, dtype)

    def cost(self, method: Method | None = None) -> Cost:
        return cost_of(self.config, method or self.method)

    def length(self) -> int:
        """Tokens of a prompt after which the method holds fewer rows than there are.

        The shortest of some; at least 16, and that also where nothing is ever let go of.
        """
        full = self.cost(resolve({}))
        tokens = 16
        while tokens <= LONGEST:
            kept = kept_rows(self.cost(), tokens + 8, tokens)
            if kept < kept_rows(full, tokens + 8, tokens):
                return tokens
            tokens *= 2
        return 16


def cases(method: Method) -> list[Case]:
    """A method on every decoder."""
    return [Case(method, decoder) for decoder in DECODERS]


def read_method(written: str) -> Method:
    """Read a method from its name, or from JSON: h2o, or {"h2o": {}, "kivi": {"bits": 4}}.

    Raises:
        MethodError: in one line.
    """
    if not written.lstrip().startswith("{"):
        return resolve(written)
    try:
        return resolve(json.loads(written))
    except ValueError as error:
        raise MethodError(f"{written!r} is no JSON: {error}") from error


def refuse(method: Method, config: DecoderConfig) -> None:
    """Raise an UnfitError if the method cannot be chosen at run time for such a decoder."""
    try:
        refuse_misfits(method, config)
    except MethodError as error:
        raise UnfitError(str(error)) from error
    for axis, choice in method.choices.items():
        if axis in TRAIN_TIME and not choice.is_default:
            raise UnfitError(f"{choice.value.name}: is chosen when a model is trained")
        for problem in choice.value.check(choice.params, config) if choice.value.check else ():
            raise UnfitError(f"{choice.value.name}: {problem}")


def kept_rows(cost: Cost, tokens: int, prompt: int) -> float:
    """Rows that all KV layers keep together of so many tokens."""
    rows: Mapping[int, float] = cost.rows(tokens, prompt)  # type: ignore[attr-defined]
    return sum(rows.values())


@cache
def decoder(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose weights are far enough apart that no choice among rows is a tie."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 else 0.0
        parameter.normal_(mean, 0.25, generator=generator)
    return model.to(dtype)


def texts(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random token ids [B, T]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(VOCABULARY, (batch, tokens), generator=generator)


def padded(lengths: list[int]) -> Tensor:
    """Which of left-padded rows [B, T] are real."""
    longest = max(lengths)
    return torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]


def covering(method: Method, rows: int) -> Method:
    """The method with a budget so large that no layer of so many rows is cut, if it has one."""
    choice = method.choices.get("budget")
    if choice is None or "budget" not in method["eviction"].value.consumes:
        return method
    params, plenty = choice.params, 64 * rows
    if isinstance(params, Amount):
        params = replace(params, tokens=plenty)
    elif hasattr(params, "fixed"):
        fixed = params.fixed(rows)
        params = replace(fixed, tokens=tuple(plenty for _ in fixed.tokens))
    wide = Method(method.label, {**method.choices, "budget": Choice(choice.value, params)})
    return method if any(True for _ in misfits(wide)) else wide
