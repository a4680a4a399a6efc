"""What every model under comparison can do, whatever its method: the contract of the jobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.packing import Documents, Packer, TokenPacker

if TYPE_CHECKING:
    from kvlab.methods.cache.ragged import RaggedCache


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicted the tokens of a batch.

    Attributes:
        nll: [B, T] float32, minus the log probability of token t given its past; 0 if not scored.
        scored: [B, T] bool, the tokens that this model predicts (never padding, never the first).
    """

    nll: Tensor
    scored: Tensor


class Session(ABC):
    """A batch of sequences in the middle of generation: it owns the live cache.

    `logits` always holds the distribution of the next token of every sequence, [B, V].

    Attributes:
        period: steps after which the same work comes again.
    """

    logits: Tensor
    period: int = 1

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [B] to every sequence, return and keep the next logits [B, V]."""

    def extend(self, ids: Tensor, valid: Tensor | None = None, *, new_tokens: int = 0) -> Tensor:
        """Append a turn [B, T] to every sequence, return and keep the next logits [B, V].

        Here one token after another; a session that can reads the turn in one pass, and cuts the
        cache after it.

        Args:
            ids: [B, T], LEFT-padded where lengths differ.
            valid: [B, T] bool, false on padding; None where there is none.
            new_tokens: that will be generated after it, for a cache that makes room for a turn.

        Raises:
            KvlabError: turns of unequal length in a session that takes one token at a time.
        """
        refuse_unequal_turns(valid)
        for column in ids.unbind(1):
            self.step(column)
        return self.logits

    def freeze(self) -> bool:
        """Make every further period the same work on the same tensors, as `Cache.freeze` does.

        A period may begin at any step; the next one that is like it begins a period later.

        Returns:
            False: it cannot be, now, and nothing changed.
        """
        return False

    def thaw(self) -> None:  # noqa: B027
        """Leave what `freeze` began; what was captured must not be replayed any more."""

    def advance(self) -> None:
        """Hear that a captured period is about to be replayed: what the host counts moves on.

        Whoever replays puts the logits in their place.

        Raises:
            KvlabError: as steps would; nothing was counted.
        """
        raise KvlabError(f"a {type(self).__name__} is not frozen: nothing of it can be replayed")

    def parts(self) -> list[object]:
        """The objects whose attributes a step sets."""
        return [self]

    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of the storages the live cache holds now (`untyped_storage().nbytes()`)."""

    @abstractmethod
    def kv_tokens(self) -> int:
        """Tokens that those bytes stand for: sequences x tokens seen so far, padding excluded."""


def refuse_unequal_turns(valid: Tensor | None) -> None:
    """Refuse turns [B, T] with padding, which a model that takes row after row cannot leave out.

    Raises:
        KvlabError: in one line.
    """
    if valid is not None and not bool(valid.all()):
        raise KvlabError("this model takes turns of one length only: give them one by one")


def refuse_padding_behind(valid: Tensor | None) -> None:
    """Refuse sequences [B, T] that end in padding, empty ones included: nothing can follow it.

    Raises:
        KvlabError: in one line.
    """
    if valid is None or valid.is_meta:
        return
    wrong = (~valid[:, -1]).nonzero().flatten().tolist()
    if wrong:
        raise KvlabError(
            f"valid: the last token of sequence {wrong[0]} is padding: pad on the left, and give "
            "every sequence a token"
        )


class LanguageModel(nn.Module, ABC):
    """A decoder with a method's train-time axes applied.

    A value of the granularity axis names a subclass; it is made as `cls(config, method)`.

    Attributes:
        fresh: names of the parameters that `convert` did not take from the parent.
    """

    config: DecoderConfig
    method: Method
    fresh: frozenset[str] = frozenset()

    @classmethod
    @abstractmethod
    def convert(cls, parent: LanguageModel, method: Method) -> LanguageModel:
        """Return a model of this class that starts from the parent's weights (uptraining)."""

    @abstractmethod
    def forward(
        self, ids: Tensor, valid: Tensor | None = None, apply: Method | None = None
    ) -> Score:
        """Score a batch in one parallel pass; the mean of `nll[scored]` is the training loss.

        Args:
            ids: [B, T] token ids.
            valid: [B, T] bool; None states that there is no padding. Padding is never scored.
            apply: run-time axes to score under; None is full attention. They must be such that
                `scores_in_one_pass` holds.
        """

    @abstractmethod
    def predictions(self, ids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what `forward` scores with: logits [B, T, V] and `Score.scored` [B, T].

        Row t of the logits predicts token t given its past; other rows mean nothing.
        """

    @abstractmethod
    def start(
        self,
        ids: Tensor,
        valid: Tensor | None = None,
        *,
        new_tokens: int,
        apply: Method | None = None,
    ) -> Session:
        """Prefill prompts and return the session whose logits are those of the next token.

        Args:
            ids: [B, T] prompts, LEFT-padded where lengths differ.
            valid: [B, T] bool, false on padding; None where there is none.
            new_tokens: how many tokens the session will be given at most (sizes the cache).
            apply: run-time axes (eviction, budget, precision, prefill); None is the full cache.
        """

    def serve(
        self, ids: Tensor, positions: Tensor, cache: RaggedCache, passes: int | None = None
    ) -> Tensor:
        """Run the rows of one step of a server's engine.

        Args:
            ids, positions: [T], of requests that lie one behind the other; see `Batch`.
            passes: over layers that read upwards; None: as the model trains.

        Returns:
            [T, W], for `head_of`; of a prompt only the last row need mean anything.

        Raises:
            KvlabError: this model cannot be served.
        """
        raise KvlabError(f"a {type(self).__name__} cannot be served")

    def head_of(self, hidden: Tensor) -> Tensor:
        """Map what `serve` returned [T, W] to logits [T, V]."""
        raise KvlabError(f"a {type(self).__name__} cannot be served")

    @property
    def rotation(self) -> Tensor:
        """The frequencies of the acting decoder's rotation, for a cache that rotates."""
        raise KvlabError(f"a {type(self).__name__} cannot be served")

    @property
    @abstractmethod
    def acting(self) -> DecoderConfig:
        """The sizes of the decoder whose past the run-time axes shape (`Method.acting`)."""

    @abstractmethod
    def checkpoint_gradients(self, on: bool) -> None:
        """Recompute layers in the backward pass, or keep what it needs."""

    @abstractmethod
    def body_parameters(self) -> int:
        """Parameters outside the vocabulary tables (embeddings and head)."""

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `model.json` (config + method) into an existing folder."""
        from kvlab.methods.store import save

        save(self, folder)

    @classmethod
    def packer(
        cls, method: Method, documents: Documents, sequence_length: int, *, eos: int, seed: int = 0
    ) -> Packer:
        """Return the stream of rows that a model of this kind trains on.

        `method["granularity"].value.load().packer(method, ...)` finds it before there is a model.
        """
        return TokenPacker(documents, sequence_length, eos=eos, seed=seed)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The JSON that `kvlab.methods.store.load` rebuilds this model from."""
