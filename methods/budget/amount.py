"""How large a budget is: rows, or a share of the prompt. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from kvlab.methods.axis import Choice, Method, Range
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Amount:
    """Past rows that a layer keeps on average, between two steps.

    A decode step reads these and its own row, so a layer has room for one more.

    Attributes:
        share: of the rows of a prompt (of each sample's own, padding excluded).
        tokens: so many rows, whatever the prompt; it counts instead of `share`.
    """

    share: Annotated[float, Range(0.0001, 1.0, log=True)] = 0.2
    tokens: Annotated[int, Range(1, 2**20, log=True)] | None = None

    def rows(self, prompt: int) -> int:
        """Rows for a prompt of so many: at least one."""
        return self.tokens if self.tokens is not None else max(1, int(self.share * prompt))


def least_rows(method: Method) -> int:
    """Rows that every layer must keep for the method's eviction to mean anything; 0: no budget."""
    choice = method["eviction"]
    return choice.value.least(choice.params) if choice.value.least else 1


def fixed(method: Method, prompt: int) -> Method:
    """Return the method with shares turned into rows, as they are for a prompt of so many rows."""
    choice = method.choices.get("budget")
    fix: Callable[[int], object] | None = getattr(choice.params, "fixed", None) if choice else None
    if choice is None or (fix is None and not isinstance(choice.params, Amount)):
        return method
    if "budget" not in method["eviction"].value.consumes or not least_rows(method):
        return method
    if fix is not None:
        params = fix(prompt)
    else:
        params = replace(choice.params, tokens=choice.params.rows(prompt))
    return Method(method.label, {**method.choices, "budget": Choice(choice.value, params)})


def shortfall(method: Method, prompt: int, unit: str = "tokens") -> str | None:
    """Return what is wrong where a share of a prompt of so many is less than a layer needs."""
    params, least = method["budget"].params, least_rows(method)
    if "budget" not in method["eviction"].value.consumes:
        return None
    if isinstance(params, Amount):
        name, shares = "share", (params.share,) if params.tokens is None else ()
    else:
        name, shares = "shares", getattr(params, "shares", ())
    rows = int(min(shares, default=1.0) * prompt)
    if not shares or rows >= least:
        return None
    return (
        f"{name}: {min(shares)} of a prompt of {prompt} {unit} is {rows}; "
        f"{method['eviction'].value.name} keeps at least {least}: "
        f"give '{method['budget'].value.name}' a larger share, or tokens"
    )


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what is wrong with a budget of rows for the method's eviction."""
    params = method["budget"].params
    least = least_rows(method)
    if isinstance(params, Amount) and params.tokens is not None and params.tokens < least:
        eviction = method["eviction"].value.name
        yield (
            f"tokens: {eviction} keeps at least {least} rows in every layer, found "
            f"{params.tokens}: give {least} or more"
        )
