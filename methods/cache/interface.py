"""The seam between the decoder and whatever keeps its past."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import Rule
from kvlab.kernels.stored import Stored


class Step(NamedTuple):
    """One forward pass as the decoder was called: what each query row is.

    rows: T, of them per sequence. ids [B, T] (None where the rows are embeddings: block
    granularity), positions [B, T] (EMPTY on padding). `positions` None states packed rows 0..T-1
    without padding. embedded [B, T, W]: the residual stream that the rows enter with.
    """

    rows: int
    ids: Tensor | None
    positions: Tensor | None
    embedded: Tensor | None = None

    def places(self, batch: int, device: torch.device) -> Tensor:
        """The positions [B, T], of packed rows too."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.rows, device=device).expand(batch, -1)


class Extra(NamedTuple):
    """Query rows a cache adds to a step (ADORE's rebuild): they run beside the caller's rows.

    ids [B, R], positions [B, R] (EMPTY where a sample needs fewer). Whether their keys and values
    stay is the cache's own affair, as with every row.
    """

    ids: Tensor
    positions: Tensor


class Keys(NamedTuple):
    """What a layer's queries may read.

    k [B, H_kv, S, D], v [B, H_kv, S, D_v], or as `stored` says how they lie (see `attend`);
    positions [B, S] or [B, H_kv, S], EMPTY on empty rows. Rows may be in any order and S may differ
    from layer to layer. Layers whose keys have the same positions return the same tensor object, so
    that the mask is made once. positions None: in a packed step, the rows are exactly this step's,
    in order; in a step with positions, every query may read every row. The very tensor that the
    step has states that they are its rows, in order, and that their positions ascend.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None
    stored: Stored | None = None

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys [B, H_kv, S, D] and values [B, H_kv, S, D_v] as numbers."""
        return (self.k, self.v) if self.stored is None else self.stored.rows(self.k, self.v, dtype)


class Cache(ABC):
    """A decoder's past. One instance serves one batch of sequences from prefill to the last token.

    The decoder calls, in this order for every forward pass: `plan` once; for each layer `write` (KV
    layers only), `read`, `observe`; then `finish` once. A KV layer has the number of the decoder
    layer that writes it; others may read it too (`DecoderConfig.kv_of`), so its rows of this pass
    stay until the last of them has. Layers that read upward are run several times in a pass: they
    read a KV layer before it is written, `write` comes again, and its last rows count; `observe`
    comes once for each layer, in the end. The cache owns its storages and decides what stays; the
    decoder owns the maths. A cache never changes what `read` returned before the next `write` to
    that KV layer or `finish`. Not thread safe.

    Attributes:
        observes_all: it decides by what `observe` shows of every row of every layer, so that none
            may be left out of a prompt.
        sees_each: `observe` gets the attention of every query row by itself, not their sum.
        attends: it reads and attends by itself: `attend` is asked instead of `read`.
        rotates: true when keys are kept un-rotated: the decoder then rotates what `read` returned
            by `rotary_positions` instead of rotating before `write` (positions inside the cache).
    """

    rotates: bool = False
    observes_all: bool = False
    sees_each: bool = False
    attends: bool = False

    def reserve(self, rows: int | Tensor) -> None:  # noqa: B027
        """Hear that a turn of so many rows begins, its answer included (StreamingLLM's turns).

        Args: rows: padding excluded; [B] where the sequences of the batch differ.
        """

    def plan(self, step: Step) -> Extra | None:
        """Return query rows to run beside the caller's, or None."""
        return None

    @abstractmethod
    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        """Offer this step's keys and values [B, H_kv, T, D] of KV layer `layer`.

        The caller's rows come first, then those of `plan`; so in `positions` [B, T] and `observe`.
        """

    @abstractmethod
    def read(self, layer: int) -> Keys | None:
        """Return what queries may read of KV layer `layer`: this step's rows once it is written.

        Before, the past alone; None where there is none.
        """

    def attend(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        """Attend with the queries [B, H, T, D] of a decoder layer; if `attends`.

        Args:
            q: rotated, unless the cache `rotates`. own: what the model lets the layer read.

        Returns:
            [B, H, T, D_v].
        """
        raise NotImplementedError

    def rule(self, layer: int, own: Rule) -> Rule:
        """What a query of decoder layer `layer` may read: `own`, the model's, or a tighter one."""
        return own

    def rotary_positions(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to rotate (queries [B, T], keys [B, S] or [B, H_kv, S]) by; if `rotates`.

        Asked after `read`.

        `positions` [B or 1, T] are those of the queries, packed rows numbered from 0.
        """
        raise NotImplementedError

    def key_mass_rows(self, layer: int) -> slice | None:
        """The query rows of this pass whose attention `observe` of a decoder layer wants to see.

        Asked after `read`. `slice(None)`: all (H2O); `slice(-w, None)`: the last w (SnapKV; with
        left padding they are the newest of every sample); None: none, so that nothing is computed.
        """
        return None

    def observe(  # noqa: B027
        self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None
    ) -> None:
        """See the residual stream [B, T, W] around a decoder layer's attention, and its key mass.

        key_mass [B, H, S] float32: the attention that each key `read` returned got from the queries
        of `key_mass_rows`, summed over them ([B, H, rows, S] if `sees_each`); None where it asked
        for none.
        """

    def finish(self) -> None:  # noqa: B027
        """End the pass: keep, evict, free."""

    def freeze(self) -> bool:
        """Make every further pass of one row the same work on the same tensors, until `thaw`.

        Then one pass can be captured in a graph and replayed: it reads no number of the host that
        changes, and leaves what later passes read in tensors that stay. Values are those of other
        passes, but for the order of sums. A pass of several rows thaws.

        Returns:
            False: it cannot be, now, and nothing changed.
        """
        return False

    def thaw(self) -> None:  # noqa: B027
        """Leave what `freeze` began; what was captured must not be replayed any more."""

    def advance(self, passes: int) -> None:
        """Hear that so many passes of one row are about to be replayed: what the host counts moves.

        Raises:
            KvlabError: the cache is not frozen, or was opened for fewer rows; nothing was counted.
        """
        raise KvlabError(f"a {type(self).__name__} is not frozen: nothing of it can be replayed")

    def parts(self) -> list[object]:
        """The objects whose attributes a pass sets."""
        return [self]

    def state(self) -> dict[str, Tensor]:
        """Return all that `restore` needs to go on from here in another cache opened alike.

        Raises:
            KvlabError: this cache cannot be saved.
        """
        raise KvlabError(f"a {type(self).__name__} cannot be saved in mid-generation")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of another cache, opened with the same arguments, returned."""
        raise KvlabError(f"a {type(self).__name__} cannot be restored")

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the live storages (`untyped_storage().nbytes()`), tables included."""


def refuse_beyond(limit: int, rows: int) -> None:
    """Refuse to hold more rows of a sequence than a cache was opened for.

    Raises:
        KvlabError: in one line.
    """
    if rows > limit:
        raise KvlabError(
            f"the cache was opened for {limit} positions and is asked for {rows}: start the "
            "session with more new_tokens"
        )


def copy_saved(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into live ones of the same names and shapes.

    Raises:
        KvlabError: they are those of another cache.
    """
    shapes = [{name: tensor.shape for name, tensor in some.items()} for some in (saved, live)]
    if shapes[0] != shapes[1]:
        raise KvlabError(
            "the saved cache is not of this shape: open one with the same method, model, batch and "
            "number of tokens"
        )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
