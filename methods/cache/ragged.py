"""What a server's engine and a model say to each other: rows of requests at different places."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvlab.methods.cache.interface import Cache


class Batch(NamedTuple):
    """The rows [T] of one step, whose requests lie one behind the other.

    Attributes:
        prompts: the rows of each request whose whole prompt comes now.
        decoding: [R], the one row of each of the other requests.
        ends: [P], tokens that each of the former will have at most.
        prompt_blocks, blocks: [P, n] and [R, n], the blocks of the pool that each of them has, in
            order; what stands behind its last means nothing.
        longest: tokens of the longest request, at least.
    """

    prompts: tuple[slice, ...]
    decoding: Tensor
    ends: Tensor
    prompt_blocks: Tensor
    blocks: Tensor
    longest: int


class Aim(NamedTuple):
    """The rows of a pass over a decoder: whose they are.

    Attributes:
        prompts: (its number in the batch, its rows in the pass) of each prompt.
        rows: [M], rows of the pass that go on from a request's past.
        which: [M], the requests' numbers among `Batch.decoding`; None: all, in order.
    """

    prompts: tuple[tuple[int, slice], ...]
    rows: Tensor
    which: Tensor | None = None


class RaggedCache(Cache):
    """The past of all requests of an engine, which joins and ends them as it likes.

    Passes have a batch of one, [1, T, W]: what belongs together `begin` says, and `aim` where a
    model runs a decoder over other rows than the engine's. Only a model that keeps state of a
    request asks for it, or for prompts' lengths.
    """

    attends = True
    batch: Batch
    aimed: Aim

    def begin(self, batch: Batch) -> None:
        """Hear what the engine's next step is."""
        self.batch = batch
        self.aimed = Aim(tuple(enumerate(batch.prompts)), batch.decoding)

    def aim(self, aim: Aim) -> None:
        """Hear whose rows the next pass has."""
        self.aimed = aim

    def state_of(self, which: Tensor | None) -> Tensor:
        """Return what a model keeps of requests [M] that decode: [M, n], a copy."""
        raise NotImplementedError

    def keep(self, which: Tensor | None, state: Tensor) -> None:
        """Keep [M, n] of requests that decode."""
        raise NotImplementedError

    def start(self, prompts: list[int], state: Tensor) -> None:
        """Keep [P, n] of requests whose prompt came now."""
        raise NotImplementedError

    def measure(self, prompts: list[int], tokens: list[int]) -> None:
        """Note how many tokens new requests' prompts have, for `lengths`."""
        raise NotImplementedError

    def lengths(self) -> Tensor:
        """Return the tokens [R] of the prompts of requests that decode."""
        raise NotImplementedError

    def read(self, layer: int) -> None:
        raise NotImplementedError("a server's cache attends by itself")
