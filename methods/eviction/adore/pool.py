"""ADORE over a server's requests: their logs lie behind their slots, in the same blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.interface import Extra, Keys, Step
from kvlab.methods.cache.pool import PoolCache, Prompt
from kvlab.methods.eviction.adore.cache import AdoreCache
from kvlab.methods.eviction.adore.log import Log, lacking
from kvlab.methods.eviction.adore.ranking import Adore


class AdorePool(PoolCache):
    """A step reads the logs of the requests that decode, and does for all what a cache does.

    What a request's log holds of a token is an entry: words of 32 bits (its id, its scores), then
    numbers of the pool's own type.
    """

    _ranking: Adore

    def plan(self, step: Step) -> Extra | None:
        self._step: Step = step
        self._extra: Extra | None = None
        self._beside: dict[int, tuple[Tensor, Tensor]] = {}
        super().plan(step)
        return self._extra

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        if self._extra is not None:
            rows = self._rows[:, 1:]
            self._beside[layer] = k[0][:, rows].transpose(0, 1), v[0][:, rows].transpose(0, 1)
        super().write(layer, k, v, positions)

    def finish(self) -> None:
        super().finish()
        if self._decoding:
            log, blocks = self._log, self.batch.blocks
            places = log.now
            if log.scores.wants_mass or self._ranking.params.refresh > 1:  # old tokens' scores too
                every = torch.arange(log.scores.rows, device=blocks.device)
                places = torch.minimum(every, log.now)
            self._store(log, blocks, places)

    def _take(self) -> None:
        """Score the tokens of all logs, release one of each layer, and choose what to rebuild."""
        params, newest, rows = self._ranking.params, self._newest.unsqueeze(1), self._aim.rows
        prompts = self._lengths[self.batch.blocks[:, 0], 1:]
        count = int(newest.max()) + 1 if newest.device.type == "cpu" else self.batch.longest
        self._log = log = self._load(count)
        self._wanted = slice(0, 1) if log.scores.wants_mass else None
        ids, embedded = self._step.ids, self._step.embedded
        assert ids is not None
        assert embedded is not None
        log.see(Step(1, ids[0, rows, None], newest, embedded[0, rows, None]))
        held = [(self._layers, self._positions[:, :, 0])]
        done = newest - prompts  # steps
        due = None
        if params.refresh > 1:
            log.score_held(held)
            due = done[:, 0] % params.refresh == 0
        log.score(count, due)
        super()._take()
        if not params.rebuild:
            return
        others = log.rebuilt(held, newest, count)
        others = others.masked_fill((done + 1) % params.every != 0, EMPTY)
        if others.device.type == "cpu" and not bool((others != EMPTY).any()):
            return
        self._extra = Extra(log.ids_of(others).view(1, -1), others.view(1, -1))
        beside = torch.arange(others.numel(), device=rows.device).view_as(others)
        self._rows = torch.cat((self._rows, beside + self._step.rows), dim=1)
        self._asking = torch.cat((newest, others), dim=1)
        self._others = lacking(others, self._positions[:, :, 0])

    def _held(self, place: int) -> Keys:
        keys = super()._held(place)
        positions = keys.positions
        assert positions is not None
        if self._extra is not None:
            beside = self._beside[self._layers[place]]
            k, v = keys.rows(beside[0].dtype)
            k, v = torch.cat((k, beside[0]), dim=2), torch.cat((v, beside[1]), dim=2)
            positions = torch.cat((positions, self._others[place]), dim=1)
            keys = Keys(k, v, positions)
        self._read = positions
        return keys

    def _credit(self, place: int, mass: Tensor) -> None:
        number = self._log.number[self._layers[place]]
        self._log.scores.credit(number, mass.sum(1), self._read)

    def _commit(self, prompt: Prompt) -> None:
        super()._commit(prompt)
        assert isinstance(prompt.cache, AdoreCache)
        blocks = self.batch.prompt_blocks[prompt.number].unsqueeze(0)
        places = torch.arange(prompt.rows.stop - prompt.rows.start, device=blocks.device)
        self._store(prompt.cache.log, blocks, places.unsqueeze(0))

    def _load(self, count: int) -> Log:
        """Return the logs of the requests that decode, of their first `count` positions.

        What stands behind a request's newest token means nothing.
        """
        space, blocks = self._space, self.batch.blocks
        scores = self._ranking.scores(self._opening(len(blocks), count))
        log = Log(self._ranking, scores, len(blocks), self._layers)
        rows = torch.arange(space.log_rows(count), device=blocks.device)
        numbers = self._starts[blocks[:, 0], -1:] + rows
        numbers = numbers.clamp(max=blocks.shape[1] * space.block_size - 1)
        stripes = self._pool[self._flatten(blocks, numbers)]
        stripes = torch.unflatten(stripes, 1, (-1, space.stripe))
        entries = stripes.flatten(2)[..., : space.entries * space.entry]
        entries = torch.unflatten(entries, 2, (-1, space.entry)).flatten(1, 2)[:, :count]
        words, memory = entries.tensor_split((space.entry - scores.memory.shape[2],), dim=2)
        log.restore(words.contiguous().view(torch.int32), memory, self._newest)
        if space.state:
            state = self.state_of(None).contiguous().view(torch.float32)
            scores.state.copy_(state[:, : scores.state.shape[1]])
        return log

    def _store(self, log: Log, blocks: Tensor, places: Tensor) -> None:
        """Write entries at places [M, n], and states, of requests whose blocks are [M, B]."""
        space = self._space
        words, memory = log.entries(places)
        values = torch.cat((self._packed(words), memory), dim=2)
        number = torch.arange(space.entry, device=blocks.device)
        number = (places % space.entries * space.entry).unsqueeze(2) + number
        stripe = self._starts[blocks[:, 0], -1:] + places // space.entries * space.stripe
        rows = self._flatten(blocks, (stripe.unsqueeze(2) + number // space.width).flatten(1))
        self._pool[rows, number.flatten(1) % space.width] = values.flatten(1)
        if space.state:
            self._keep(blocks, self._packed(log.scores.state))

    def _packed(self, words: Tensor) -> Tensor:
        """Words [..., n] of 32 bits as numbers of the pool's type."""
        odd = words.shape[-1] * 4 % self._pool.element_size() // 4
        return F.pad(words, (0, odd)).view(self._pool.dtype)
