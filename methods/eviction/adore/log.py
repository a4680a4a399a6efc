"""What ADORE knows of every token of its sequences, and which of the released it has rebuilt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY
from kvlab.kernels.select import best
from kvlab.methods.cache.interface import Step
from kvlab.methods.eviction.adore.scores import Fresh, Scores, at

if TYPE_CHECKING:
    from kvlab.methods.eviction.adore.ranking import Adore

Held = Iterable[tuple[tuple[int, ...], Tensor]]
"""KV layers, and the positions [n, B, C] that they hold, each for itself, or once for all (n 1)."""


class Log:
    """Ids and scores of B sequences, by position; one place more takes what is padding.

    Attributes:
        ids: [B, rows + 1] int32. known: [L, B, rows + 1] float32, the scores that count now.
        scores: who makes them. number: KV layer -> which of the L is its.
        now: [B, 1], the position of the current token.
    """

    def __init__(self, ranking: Adore, scores: Scores, batch: int, layers: Iterable[int]) -> None:
        self._ranking, self._params, self.scores = ranking, ranking.params, scores
        self._rows, count, device = scores.rows, scores.layers, scores.device
        self.ids = torch.zeros(batch, self._rows + 1, dtype=torch.int32, device=device)
        self.known = torch.full((count, *self.ids.shape), float("-inf"), device=device)
        self.number = {kv: i if count > 1 else 0 for i, kv in enumerate(sorted(layers))}
        ranking.current = self.number, self.known

    def see(self, step: Step) -> None:
        """Take in a pass's tokens; the last of each sequence is the current one."""
        if step.ids is None or step.embedded is None:
            raise KvlabError("adore releases tokens: this decoder runs over blocks of them")
        ids, embedded = step.ids, step.embedded
        batch, rows = ids.shape
        places, counts = step.positions, torch.full((batch,), rows, device=ids.device)
        if places is None:
            places = torch.arange(rows, device=ids.device).expand(batch, -1)
        elif rows > 1:  # padding stands before a sample's own rows, and goes behind them
            counts = (places != EMPTY).sum(1)
            order = torch.arange(rows, device=ids.device) - counts.unsqueeze(1)
            order = torch.remainder(order, rows)
            places = places.gather(1, order)
            places = torch.where(places == EMPTY, self._rows, places)
            ids = ids.gather(1, order)
            embedded = embedded.gather(1, order.unsqueeze(-1).expand_as(embedded))
        self.ids.scatter_(1, places, ids.int())
        self.now = torch.where(places < self._rows, places, EMPTY).amax(1, keepdim=True)
        self.scores.see(Fresh(embedded, places, counts))

    def score(self, count: int, due: Tensor | None = None) -> None:
        """Score the first `count` positions; of the sequences [B] that are `due`, None: of all."""
        found = self.scores.every(count, self.now)
        if due is not None:
            found = torch.where(due.unsqueeze(-1), found, self.known[:, :, :count])
        self.known[:, :, :count] = found

    def score_held(self, held: Held) -> None:
        """Score what is held alone."""
        for layers, positions in held:
            for layer, own in zip(layers, positions, strict=False):
                number = self.number[layer]
                place = torch.where(own == EMPTY, self._rows, own)
                found = self.scores.of(number, place, self.now)
                self.known[number].scatter_(1, place, found)

    def rebuilt(self, held: Held, own: Tensor, count: int) -> Tensor:
        """Choose what to rebuild: positions [B, R], EMPTY where fewer tokens were released.

        Args: own: [B, T], positions of the pass's rows. count: positions there are.
        """
        params = self._params
        scores, away = self._released(held, own, count)
        each = params.context + 1
        limit = float("-inf") if params.threshold is None else _logit(params.threshold)
        chosen = best(scores, min(params.rebuild // each, count), above=limit)
        return chosen if each == 1 else self._with_context(chosen, away)

    def ids_of(self, positions: Tensor) -> Tensor:
        """The tokens [B, R] at positions; those of EMPTY mean nothing."""
        return self.ids.gather(1, positions.clamp_min(0)).long()

    def entries(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of tokens at places [B, n]: words [B, n, w] int32, numbers [B, n, m]."""
        words = [self.ids.gather(1, places)]
        for scores in self._scored():
            words += [own.view(torch.int32).gather(1, places) for own in scores]
        return torch.stack(words, dim=2), at(self.scores.memory, places)

    def restore(self, words: Tensor, memory: Tensor, now: Tensor) -> None:
        """Take over the entries of the first n positions; nothing is known of that at `now` [B]."""
        count, scored = words.shape[1], self._scored()
        self.ids[:, :count] = words[..., 0]
        found = words[..., 1:].view(torch.float32).movedim(2, 0)
        for kept, own in zip(scored, torch.split(found, self.scores.layers), strict=False):
            kept[:, :, :count] = own
        self.scores.memory[:, :count] = memory
        place = now[:, None].expand(self.scores.layers, -1, 1)
        self.known.scatter_(2, place, float("-inf"))
        for kept in scored[1:]:
            kept.scatter_(2, place, 0.0)

    def _scored(self) -> list[Tensor]:
        """All scores [L, B, rows + 1] float32 that a token has."""
        return [self.known, *self.scores.kept]

    def tensors(self) -> dict[str, Tensor]:
        """What a saved cache keeps of it: the live tensors."""
        return {"ids": self.ids, "known": self.known, **self.scores.tensors()}

    def _released(self, held: Held, own: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What a layer lacks of the first `count` positions, but for the rows of this pass.

        Returns: the highest score [B, count] in a layer that lacks it, -inf where none does; and
            a mark [B, count] where one does.
        """
        past = torch.arange(count, device=own.device) <= self.now
        away = torch.zeros_like(past)
        scores = torch.full(past.shape, float("-inf"), device=own.device)
        for layers, positions in held:
            place = torch.cat((positions, own.expand(len(positions), -1, -1)), dim=2)
            place = torch.where(place == EMPTY, self._rows, place)
            everywhere = (len(positions), *self.ids.shape)
            lacks = torch.ones(everywhere, dtype=torch.bool, device=own.device)
            lacks = lacks.scatter_(2, place, False)[:, :, :count] & past
            known = self._ranking.known_of(layers[: len(positions)])[:, :, :count]
            found = torch.where(lacks, known, float("-inf")).amax(0)
            scores, away = torch.maximum(scores, found), away | lacks.any(0)
        return scores, away

    def _with_context(self, chosen: Tensor, away: Tensor) -> Tensor:
        """Add to positions [B, n] those before each that are away too; none comes twice."""
        before = torch.arange(self._params.context + 1, device=chosen.device)
        runs = (chosen.unsqueeze(-1) - before).masked_fill((chosen == EMPTY).unsqueeze(-1), EMPTY)
        ordered = runs.flatten(1).clamp_min(EMPTY).sort(dim=-1).values
        twice = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        there = away.gather(1, ordered.clamp_min(0))
        return ordered.masked_fill(twice | ~there, EMPTY)


def lacking(others: Tensor, held: Tensor) -> Tensor:
    """Positions [B, R], EMPTY where a layer that holds positions [..., B, C] has the token."""
    twice = (held.unsqueeze(-1) == others.unsqueeze(-2)).any(-2)
    return torch.where(twice, EMPTY, others)


def _logit(share: float) -> float:
    return float(torch.logit(torch.tensor(share, dtype=torch.float64)))
