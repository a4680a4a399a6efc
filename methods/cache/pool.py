"""A server's cache: rows of many requests in one pool of blocks, ranked as in an `EvictingCache`.

A request has an arena: the rows of its blocks, one behind the other. First what the model keeps of
it, then the slots of each KV layer, to the row; where an eviction grows, then a row of each KV
layer for every later position; where it logs all tokens, then their log. Nothing here loops over
requests in a decode step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY, Rule, attend
from kvlab.kernels.choice import fused
from kvlab.kernels.stored import Stored
from kvlab.methods.axis import Method
from kvlab.methods.cache.arena import Space
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.interface import Extra, Keys, Step
from kvlab.methods.cache.opening import Opening
from kvlab.methods.cache.ragged import RaggedCache
from kvlab.methods.cache.ranking import InSlots, Rows, replaced
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.rope import Rotations


class Prompt:
    """A prompt in the making: a cache of its own, whose rows go to the pool at its end."""

    def __init__(self, number: int, rows: slice, end: int, cache: EvictingCache) -> None:
        self.number, self.rows, self.end, self.cache = number, rows, end, cache
        self.mass: dict[int, Tensor | None] = {}


class PoolCache(RaggedCache):
    """Args:
    config: of the decoder whose past it is. method: its run-time axes count.
    slots: which rows stay.
    pool: [blocks * block_size, width]; block 0 is nobody's.
    frequencies: of the decoder's rotation.
    """

    def __init__(
        self,
        config: DecoderConfig,
        method: Method,
        slots: InSlots,
        pool: Tensor,
        space: Space,
        frequencies: Tensor,
    ) -> None:
        self._config, self._method, self._space, self._pool = config, method, space, pool
        self._ranking, self._budget = slots
        self.rotates = self._ranking.in_cache
        self.observes_all = True
        self._frequencies = frequencies.to(pool.device)
        self._layers = config.kv_layers
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        self._heads = heads = self._ranking.heads(config)
        self._apart = heads if self._ranking.by_head else 1
        self._scored = self._ranking.voters(prompt=False) is not None
        self._wanted = slice(None) if self._scored else None
        numbers = 2 * heads * config.head_dim
        self._kv = torch.unflatten(pool[:, :numbers], 1, (heads, -1))
        known = self._apart * (1 + self._scored)
        begun = numbers * pool.element_size() // 4
        self._known = pool.view(torch.int32)[:, begun : begun + known]
        blocks = len(pool) // space.block_size
        device, count = pool.device, len(self._layers)
        self._starts = torch.zeros(blocks, count + 1, dtype=torch.int32, device=device)
        self._budgets = torch.zeros(blocks, count, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(blocks, 2, dtype=torch.int64, device=device)
        self._widest = [0] * count
        self._windows = self._readable(config)
        pool[: space.block_size].zero_()
        self._known[: space.block_size] = EMPTY
        self._prompts: list[Prompt] = []
        self._decoding = 0

    def plan(self, step: Step) -> Extra | None:
        assert step.positions is not None
        aim = self._aim = self.aimed
        self._prompts = []
        self._rotations = Rotations(self._frequencies)
        ends = self.batch.ends.tolist() if aim.prompts else []
        for number, rows in aim.prompts:
            length, end = rows.stop - rows.start, self._method.positions(ends[number])
            most = length + 1 if self._ranking.grows else max(end, length + 1)
            cache = self._ranking.open(self._opening(1, most), self._budget)
            cache.plan(Step(length, *(_part(x, rows) for x in (step.ids, None, step.embedded))))
            self._prompts.append(Prompt(number, rows, end, cache))
        self._decoding = len(aim.rows)
        if self._decoding:
            self._rows = aim.rows.unsqueeze(1)
            self._newest = step.positions[0, aim.rows]
            self._asking = self._newest.unsqueeze(1)
            self._find()
            self._take()
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        for prompt in self._prompts:
            prompt.cache.write(layer, k[:, :, prompt.rows], v[:, :, prompt.rows], None)
        if self._decoding:
            came = torch.cat((k[0][:, self._aim.rows], v[0][:, self._aim.rows]), dim=-1)
            came = came.repeat_interleave(self._heads // len(came), 0).transpose(0, 1)
            target = self._targets[self._place[layer]]
            if self._apart == 1:
                self._kv[target[:, 0]] = came
            else:
                self._kv[target, torch.arange(self._heads, device=target.device)] = came

    def attend(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        out = torch.empty_like(q)
        for prompt in self._prompts:
            out[:, :, prompt.rows] = self._attend_prompt(layer, q[:, :, prompt.rows], own, prompt)
        if self._decoding:
            found = self._attend_past(layer, q[0][:, self._rows].transpose(0, 1), own)
            out[0][:, self._rows] = found.transpose(0, 1)
        return out

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        for prompt in self._prompts:
            rows = prompt.rows
            mass = prompt.mass.pop(layer, None)
            prompt.cache.observe(layer, before[:, rows], after[:, rows], mass)

    def finish(self) -> None:
        for prompt in self._prompts:
            prompt.cache.finish()
            self._commit(prompt)
        self._prompts = []
        if self._decoding and self._scored:
            scores = self._scores.movedim(-1, 2).contiguous().view(torch.int32)
            self._known.view(len(self._known), self._apart, 2)[self._flat, :, 1] = scores

    def nbytes(self) -> int:
        tables = (self._starts, self._budgets, self._lengths)
        return sum(t.untyped_storage().nbytes() for t in (self._pool, *tables))

    def state_of(self, which: Tensor | None) -> Tensor:
        return self._pool[self._heading(self._blocks(which))].flatten(1)[:, : self._space.state]

    def keep(self, which: Tensor | None, state: Tensor) -> None:
        self._keep(self._blocks(which), state)

    def start(self, prompts: list[int], state: Tensor) -> None:
        self._keep(self.batch.prompt_blocks[prompts], state)

    def lengths(self) -> Tensor:
        return self._lengths[self.batch.blocks[:, 0], 0]

    def measure(self, prompts: list[int], tokens: list[int]) -> None:
        """Note how many tokens new requests' prompts have."""
        blocks = self.batch.prompt_blocks[prompts, 0]
        self._lengths[blocks, 0] = torch.tensor(tokens, device=blocks.device)

    def _keep(self, blocks: Tensor, state: Tensor) -> None:
        space = self._space
        spare = space.head * space.width - space.state
        rows = torch.unflatten(torch.nn.functional.pad(state, (0, spare)), 1, (space.head, -1))
        self._pool[self._heading(blocks)] = rows.to(self._pool.dtype)

    def _heading(self, blocks: Tensor) -> Tensor:
        """Pool rows [M, head] of what is kept of requests beside their slots."""
        numbers = torch.arange(self._space.head, device=blocks.device).expand(len(blocks), -1)
        return self._flatten(blocks, numbers)

    def _blocks(self, which: Tensor | None) -> Tensor:
        return self.batch.blocks if which is None else self.batch.blocks[which]

    def _flatten(self, blocks: Tensor, numbers: Tensor) -> Tensor:
        """From rows [M, S] of requests' arenas to rows of the pool."""
        size = self._space.block_size
        return blocks.gather(1, numbers // size) * size + numbers % size

    def _find(self) -> None:
        """Find every row of the requests that decode, in all layers."""
        blocks = self._blocks(self._aim.which)
        handles = blocks[:, 0]
        starts = self._starts[handles].long()
        sizes = starts[:, 1:] - starts[:, :-1]
        widths = sizes.amax(0).tolist() if sizes.device.type == "cpu" else self._widest
        self._columns = [range(width) for width in widths]
        slots = torch.arange(max(widths), device=starts.device)
        numbers = starts[:, :-1].T.unsqueeze(-1) + slots  # [K, M, S]
        valid = slots < sizes.T.unsqueeze(-1)
        self._grown = None
        if self._ranking.grows:
            numbers, valid, self._grown = self._with_later(handles, starts, numbers, valid)
        numbers = numbers.masked_fill(~valid, 0)
        layers, count = len(numbers), len(handles)
        flat = self._flatten(blocks, numbers.transpose(0, 1).flatten(1)).view(count, layers, -1)
        self._sizes = sizes.T
        self._flat = flat.transpose(0, 1).masked_fill(~valid, 0)
        known = torch.unflatten(self._known[self._flat], -1, (self._apart, -1))
        self._positions = known[..., 0].transpose(2, 3).long()  # [K, M, heads or 1, S]
        self._positions = self._positions.masked_fill(~valid.unsqueeze(2), EMPTY)
        self._scores = known[..., -1].contiguous().view(torch.float32).transpose(2, 3).contiguous()
        self._standing: dict[int, tuple[Tensor, Tensor]] = {}

    def _take(self) -> None:
        """Choose a row of each layer for what comes."""
        layers, count, newest = *self._flat.shape[:2], self._newest[:, None, None]
        if self._grown is None:
            budgets = self._budgets[self._blocks(self._aim.which)[:, 0]].T
            rows = Rows(
                self._positions, self._scores if self._scored else None, newest - 1,
                budgets[:, :, None, None], self._heads, self._layers,
            )  # fmt: skip
            stays = self._ranking.stays(budgets)
            slot = replaced(self._ranking, rows, newest, stays, self._windows, self._sizes)
        else:
            slot = self._grown.expand(layers, -1).reshape(layers, count, 1, 1)
            slot = slot.expand(-1, -1, self._apart, -1)
            self._positions.scatter_(-1, slot, newest.expand(slot.shape))
            if self._scored:
                self._scores.scatter_(-1, slot, 0.0)
        flat = self._flat.unsqueeze(2).expand(-1, -1, self._apart, -1)
        self._targets = flat.gather(-1, slot).squeeze(-1)  # [K, M, heads or 1]
        heads = torch.arange(self._apart, device=flat.device)
        place = self._known.view(len(self._known), self._apart, -1)[..., 0]
        place[self._targets, heads] = newest[:, :, 0].int().expand(self._targets.shape)

    def _with_later(
        self, handles: Tensor, starts: Tensor, numbers: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the rows that came after the prompts; return also the new one's column [M]."""
        layers, width = len(numbers), numbers.shape[-1]
        later = self._newest - self._lengths[handles, 1]
        bound = int(later.max()) + 1 if later.device.type == "cpu" else self.batch.longest
        each = torch.arange(bound, device=starts.device)
        own = torch.arange(layers, device=starts.device)[:, None, None]
        rows = starts[:, -1].unsqueeze(-1) + each * layers + own
        there = (each <= later.unsqueeze(-1)).expand(layers, -1, -1)
        self._columns = [range(width + bound)] * layers
        return torch.cat((numbers, rows), -1), torch.cat((valid, there), -1), width + later

    def _attend_past(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        """Attend with [M, H, T, D] to the requests' own slots."""
        place = self._place[self._config.kv_of[layer]]
        keys = self._held(place)
        if self.rotates:
            assert keys.positions is not None
            for_queries, for_keys = self._stand(place, keys.positions)
            q = self._rotations(q, for_queries)
            keys = self._rotations.keys(keys, for_keys, q)
        out, mass = attend(
            q, keys.k, keys.v, self._asking, keys.positions, own, self._wanted, stored=keys.stored
        )
        if mass is not None:
            self._credit(place, mass)
        return out

    def _held(self, place: int) -> Keys:
        """The rows of a KV layer, [M, heads, S, D]: where they lie in the pool, or a copy."""
        columns = len(self._columns[place])
        flat = self._flat[place, :, :columns]
        positions = self._positions[place, ..., :columns]
        positions = positions if self._apart > 1 else positions[:, 0]
        if fused(self._kv):
            k, v = self._kv.chunk(2, dim=-1)
            return Keys(k, v, positions, Stored(table=flat))
        rows = torch.unflatten(self._kv.index_select(0, flat.flatten()), 0, flat.shape)
        k, v = rows.transpose(1, 2).chunk(2, dim=-1)
        return Keys(k, v, positions)

    def _credit(self, place: int, mass: Tensor) -> None:
        """Hear what attention [M, H, S] the rows of a KV layer received."""
        grown = self._ranking.tally(mass, self._heads)
        self._scores[place, ..., : grown.shape[-1]] += grown

    def _stand(self, place: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Number the rows that are held in the order of their positions: of queries, of keys."""
        if place not in self._standing:
            empty = (positions == EMPTY).sum(-1, keepdim=True)
            numbers = (positions.argsort(-1).argsort(-1) - empty).clamp_min(0)
            empty = empty if self._apart == 1 else empty[:, 0]
            self._standing[place] = positions.shape[-1] - 1 - empty, numbers
        return self._standing[place]

    def _attend_prompt(self, layer: int, q: Tensor, own: Rule, prompt: Prompt) -> Tensor:
        cache = prompt.cache
        keys = cache.read(self._config.kv_of[layer])
        assert keys is not None
        k = keys.k
        if self.rotates:
            places = torch.arange(q.shape[2], device=q.device).unsqueeze(0)
            q, k = self._rotations(q, places), self._rotations(k, places)
        rule, wanted = cache.rule(layer, own), cache.key_mass_rows(layer)
        out, prompt.mass[layer] = attend(q, k, keys.v, None, keys.positions, rule, wanted)
        return out

    def _commit(self, prompt: Prompt) -> None:
        """Give a prompt's rows that stay their slots."""
        cache, space = prompt.cache, self._space
        blocks = self.batch.prompt_blocks[prompt.number].unsqueeze(0)
        kept = [cache.kept(layer) for layer in self._layers]
        budgets = [int(budget) for _, budget in kept]
        sizes = [
            held.positions.shape[-1] if self._ranking.grows else budget + 1
            for (held, _), budget in zip(kept, budgets, strict=True)
        ]
        starts = torch.tensor([space.head, *sizes]).cumsum(0)
        length = prompt.rows.stop - prompt.rows.start
        if (wanted := sum(sizes)) > (room := space.slots(length, prompt.end)):
            raise KvlabError(
                f"a prompt of {length} positions keeps {wanted} rows, and its blocks hold {room}"
            )
        numbers = torch.arange(int(starts[0]), int(starts[-1]), device=blocks.device)
        flat = self._flatten(blocks, numbers.unsqueeze(0))[0]
        self._pool[flat] = 0
        self._known[flat] = (
            torch.tensor([EMPTY, 0][: 1 + self._scored] * self._apart).int().to(flat.device)
        )
        known = self._known.view(len(self._known), self._apart, -1)
        for place, (held, _) in enumerate(kept):
            begun = int(starts[place] - starts[0])
            rows = flat[begun : begun + held.positions.shape[-1]]
            self._kv[rows] = torch.cat((held.k[0], held.v[0]), dim=-1).transpose(0, 1)
            known[rows, :, 0] = held.positions[0].T.int()
            if self._scored and held.scores is not None:
                known[rows, :, 1] = held.scores[0].T.contiguous().view(torch.int32)
        handle = blocks[0, 0]
        self._starts[handle] = starts.to(self._starts)
        self._budgets[handle] = torch.tensor(budgets).to(self._budgets)
        self._lengths[handle, 1] = length
        self._widest = [max(pair) for pair in zip(self._widest, sizes, strict=True)]

    def _opening(self, batch: int, rows: int) -> Opening:
        pool = self._pool
        return Opening(self._config, self._method, batch, rows, pool.device, pool.dtype)

    def _readable(self, config: DecoderConfig) -> Tensor | None:
        """Rows back [K] that each KV layer's readers can still read; None: all."""
        if config.windows is None:
            return None
        opening = self._opening(1, 2**40)
        readers = opening.readers()
        found = [opening.window(readers[layer]) for layer in self._layers]
        return torch.tensor(found, device=self._pool.device)


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, rows]
