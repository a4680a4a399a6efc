"""What a method takes of a paged server's pool, predicted from sizes alone. No torch.

A server divides its memory into blocks of equal size and gives a request whole ones. How many it
needs differs from the bytes that the method itself keeps, and depends on how rows are laid out:

- `Paged`: a block holds `block_size` tokens of the KV layers of a group, as in vLLM's own models.
  Layers with a window give back the blocks that left it.
- `Slots`: a request has an arena of rows, which its KV layers divide among themselves to the row; a
  block holds `block_size` of them. All that a request will need is given to it when it is admitted,
  so that it is never turned out, which would change what it keeps.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvlab import KvlabError
from kvlab.methods.axis import TRAIN_TIME, AxisName, Choice, Method
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.budget.cost import POSITION
from kvlab.methods.cache.arena import Space
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import from_dict

KNOWN = WORD = 4
"""Bytes of what is known of a row: where it stood (int32), what it scored (float32)."""
SLOTS_OF_A_BLOCK = 16
"""Rows of a block of slots: small, so that little is unused at a request's end."""
PAGES = {"cpu": 128, "cuda": 16}
"""Tokens of vLLM's page where nobody says otherwise."""
ALIGNMENT = 16
"""Rows begin at multiples of so many bytes, as vector loads want them."""


class Unserved(KvlabError):
    """A method, or a combination of choices, that the server cannot keep."""


class Demand(ABC):
    """What requests take of a pool; see the module's text."""

    @abstractmethod
    def blocks(self, prompt: int, tokens: int) -> int:
        """Blocks that a request of so many tokens holds at most, `prompt` of them given."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of a block."""

    def most_blocks(self, tokens: int) -> int:
        """Blocks that a request of at most so many tokens can need, whatever its prompt."""
        return max(self.blocks(prompt, tokens) for prompt in (1, tokens))

    def requests(self, pool: int, prompt: int, tokens: int) -> int:
        """How many such requests a pool of so many bytes holds; one block is never given."""
        return (pool // self.block_bytes - 1) // self.blocks(prompt, tokens)


@dataclass(frozen=True, slots=True)
class Paged(Demand):
    """Attributes:
    block_size: tokens of a block. row_bytes: of one KV layer's row.
    windows: of each KV layer, the tokens that a query reads; None: all.
    in_flight: tokens that a step may add to a request before blocks are given back.
    """

    block_size: int
    row_bytes: int
    windows: tuple[int | None, ...]
    in_flight: int

    def blocks(self, prompt: int, tokens: int) -> int:
        whole = math.ceil(tokens / self.block_size)
        found = 0
        for window, layers in Counter(self.windows).items():
            each = whole
            if window is not None:
                each = min(whole, self._windowed(window, tokens))
            found += each * math.ceil(layers / self.group)
        return found

    def most_blocks(self, tokens: int) -> int:
        """The same, but for a block more of each window, which vLLM reckons with."""
        whole = math.ceil(tokens / self.block_size)
        return sum(
            (whole if window is None else self._windowed(window, tokens))
            * math.ceil(layers / self.group)
            for window, layers in Counter(self.windows).items()
        )

    def _windowed(self, window: int, tokens: int) -> int:
        return math.ceil(min(window - 1 + self.in_flight, tokens) / self.block_size) + 1

    @property
    def group(self) -> int:
        """Layers that one block serves: those of the smallest kind, or of the largest if close."""
        counts = Counter(self.windows).values()
        return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.row_bytes * self.group


@dataclass(frozen=True, slots=True)
class Slots(Demand):
    """Attributes:
    block_size: rows of a block.
    config: of the decoder whose past is kept. method: its run-time axes count.
    span: tokens that one position stands for.
    itemsize: bytes of a number.
    state: bytes that a request has beside its rows.
    """

    block_size: int
    config: DecoderConfig
    method: Method
    span: int
    itemsize: int
    state: int

    def __hash__(self) -> int:
        return hash((self.block_size, self.config.layers, self.span, self.itemsize, self.state))

    @property
    def heads(self) -> int:
        """Heads that rows are kept for."""
        count = getattr(self._cost, "heads", None)
        return int(count(self.config, self.method)) if count else self.config.kv_heads

    @property
    def known(self) -> int:
        """Bytes of what is known of a row; of each head's, where they keep rows of their own."""
        own = getattr(self._cost, "slot_bytes", None)
        bytes_: int = own(self.config, self.method) if own else 0
        if not bytes_:
            return KNOWN
        return self.heads * (2 * KNOWN if bytes_ > POSITION else KNOWN)

    @property
    def width(self) -> int:
        """Numbers of a row: keys and values, what is known of it, and what fills it up."""
        bytes_ = 2 * self.heads * self.config.head_dim * self.itemsize + self.known
        return math.ceil(bytes_ / ALIGNMENT) * ALIGNMENT // self.itemsize

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.width * self.itemsize

    @property
    def head(self) -> int:
        """Rows in front of the slots that hold the request's state."""
        return math.ceil(self.state / (self.width * self.itemsize))

    @property
    def budgeted(self) -> bool:
        """Whether a prompt is cut."""
        return "budget" in self.method["eviction"].value.consumes

    @property
    def grows(self) -> bool:
        """Whether all that comes after a prompt stays."""
        eviction = self.method["eviction"]
        grows = eviction.value.grows
        return not self.budgeted or (grows is not None and grows(eviction.params))

    def slots(self, prompt: int, end: int) -> int:
        """Slots of all layers for a prompt of so many positions, of a request of at most `end`."""
        layers = self.config.kv_layers
        if not self.budgeted:
            return prompt * len(layers)
        budget = importlib.import_module(str(self.method["budget"].value.cost))
        rows: list[float] = [
            budget.rows(self.config, self.method, layer, prompt) for layer in layers
        ]
        if self.grows:
            return math.ceil(sum(min(own, prompt) for own in rows))
        # What one layer cannot fill another may get: the sum counts.
        most = len(layers) * max(end, least_rows(self.method))
        return min(math.ceil(sum(rows)), most) + len(layers)

    def blocks(self, prompt: int, tokens: int) -> int:
        first = math.ceil(prompt / self.span)
        later = (tokens - prompt) // self.span if self.grows else 0
        rows = self.head + self.slots(first, self.method.positions(tokens))
        rows += later * len(self.config.kv_layers) + self.space().log_rows(tokens)
        return math.ceil(rows / self.block_size)

    def space(self) -> Space:
        """Return how a request's rows lie."""
        return Space(
            self.width,
            self.block_size,
            self.head,
            self.state // self.itemsize,
            self.entry,
            self.slots,
        )

    @property
    def beside(self) -> int:
        """Rows that a step may run beside a request's own."""
        own = getattr(self._cost, "most_beside", None)
        return int(own(self.config, self.method)) if own else 0

    def gathered(self, tokens: int) -> int:
        """Numbers that a step holds of a request, of at most so many tokens, outside the pool.

        One layer's rows, then their keys and values apart; and its log, which is read, taken apart
        and scored.
        """
        layers = len(self.config.kv_layers)
        most = self.method.positions(tokens)
        slots = math.ceil(self.slots(most, most) / layers)
        return 2 * slots * self.width + 3 * tokens * self.entry

    @property
    def entry(self) -> int:
        """Numbers that are kept of every token, held or not."""
        own = getattr(self._cost, "entry", None)
        words, numbers = own(self.config, self.method) if own else (0, 0)
        return math.ceil(words * WORD / self.itemsize) + int(numbers)

    @property
    def _cost(self) -> Any:
        return _cost(self.method, "eviction")


def demand_of(
    config: DecoderConfig,
    trained: Mapping[str, Any],
    apply: Mapping[str, Any],
    *,
    itemsize: int,
    block_size: int,
    in_flight: int,
) -> Demand:
    """Return what a model takes of a pool under run-time choices.

    Args:
        config: of the model as a whole. trained, apply: methods in canonical form.
        in_flight: tokens that a step may add to a request.

    Raises:
        Unserved: the server cannot keep it.
    """
    method = under(trained, apply)
    if problem := next(iter(problems(config, method)), None):
        raise Unserved(problem)
    acting = method.acting(config)
    row = 2 * acting.kv_heads * acting.head_dim * itemsize
    if layout(method) == "paged":
        return Paged(block_size, row, windows(acting, method), in_flight)
    return Slots(
        block_size, acting, method, method.span(), itemsize, state_of(config, method, itemsize)
    )


def usual_block(method: Method, device: str) -> int:
    """Rows of a block where nobody says otherwise: vLLM's pages on a "cpu" or "cuda", or slots'."""
    return PAGES[device] if layout(method) == "paged" else SLOTS_OF_A_BLOCK


def under(trained: Mapping[str, Any], apply: Mapping[str, Any]) -> Method:
    """Return a model's method with its run-time axes chosen."""
    made, chosen = from_dict(trained), from_dict(apply)
    choices: dict[Any, Choice] = dict(made.choices)
    choices |= {axis: choice for axis, choice in chosen.choices.items() if axis not in TRAIN_TIME}
    return Method(made.label, choices)


def layout(method: Method) -> str | None:
    """How the server keeps a method: "paged", "slots"; None: it cannot."""
    eviction = method["eviction"]
    served = eviction.value.served
    found = served(eviction.params) if served else None
    return "slots" if found == "paged" and method.span() > 1 else found


def windows(config: DecoderConfig, method: Method) -> tuple[int | None, ...]:
    """Tokens that a query of each KV layer's readers reads, the tighter of model and method."""
    eviction = method["eviction"]
    cost = importlib.import_module(str(eviction.value.cost))
    found = []
    for kv in config.kv_layers:
        readers = [layer for layer, source in enumerate(config.kv_of) if source == kv]
        own = [config.windows[layer] if config.windows else None for layer in readers]
        model = None if None in own else max(own)  # type: ignore[type-var]
        chosen = cost.prompt_window(config, method, kv)
        both = [window for window in (model, chosen) if window is not None]
        found.append(min(both, default=None))
    return tuple(found)


def state_of(config: DecoderConfig, method: Method, itemsize: int) -> int:
    """Bytes that a request has beside its rows."""
    read: dict[AxisName, DecoderConfig]
    read = {"granularity": config, "eviction": method.acting(config)}
    found = 0
    for axis, sizes in read.items():
        own = getattr(_cost(method, axis), "state_bytes", None)
        found += int(own(sizes, method, itemsize)) if own else 0
    return found


def _mixed_windows(acting: DecoderConfig, method: Method, how: str | None) -> list[str]:
    """What is wrong where layers that share keys have windows: pages go by the owner's."""
    if how != "paged" or acting.sharing is None:
        return []
    own = acting.windows or (None,) * acting.layers
    for layer, kv in enumerate(acting.kv_of):
        if own[layer] != own[kv]:
            return [
                f"layers {kv} and {layer} share keys and have windows of {own[kv]} and "
                f"{own[layer]}: layers that share can be served with one window"
            ]
    strict = acting.sharing.strict or acting.upward
    if strict and 1 in windows(acting, method):
        return ["a window of 1 leaves nothing to layers that do not read their own token"]
    return []


def _cost(method: Method, axis: AxisName) -> Any:
    """The cost module of a choice; for a server it may have `state_bytes`, `entry`, `unserved`."""
    return importlib.import_module(str(method[axis].value.cost))


def problems(config: DecoderConfig, method: Method) -> list[str]:
    """Say why the server cannot keep a method; nothing where it can."""
    found = []
    eviction, precision = method["eviction"], method.choices.get("precision")
    how, acting = layout(method), method.acting(config)
    if how is None:
        found.append(f"'{eviction.value.name}' cannot be served yet")
    if precision is not None and not precision.is_default:
        found.append(
            f"'{precision.value.name}' cannot be served: the engine has quantised caches of its "
            "own (--kv-cache-dtype)"
        )
    if method.span() > 1 and windows(acting, method) != (None,) * len(acting.kv_layers):
        found.append(f"'{eviction.value.name}' over blocks cannot be served with a window")
    sharing = acting.sharing
    if sharing is not None:
        if any(acting.kv_of[kv] != kv for kv in acting.kv_layers):
            found.append("layers that keep keys and read others' cannot be served")
        if sharing.sequential:
            found.append("layers that run row by row (sequential) cannot be served")
        if how == "slots" and (sharing.strict or acting.upward):
            found.append(
                f"'{eviction.value.name}' is served where layers share keys downwards alone (a "
                "bottom layout)"
            )
        found += _mixed_windows(acting, method, how)
    budget = method["budget"].params
    if getattr(budget, "rounding", "conserve") == "truncate" and how == "slots":
        found.append("rounding: truncate: a server must know how many rows there are: leave it out")
    if getattr(budget, "refresh", None) is not None and how == "slots":
        found.append("refresh: budgets that are divided anew cannot be served: leave it out")
    for axis in ("granularity", "eviction"):
        unserved = getattr(_cost(method, axis), "unserved", None)
        if unserved is not None and (problem := unserved(method)):
            found.append(problem)
    return found
