"""ADORE's controller: how much each token so far matters to the current one (arXiv 2407.02328)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.kernels.adore import Cell, Head
from kvlab.methods.eviction.adore.sizes import BUCKETS, CONFIG, ControllerConfig, config_of

WEIGHTS = "controller.safetensors"
FARTHEST = 2**20


class Memory(NamedTuple):
    """What scores need of tokens [B, T]: nothing else of their state is ever asked for again.

    key [B, T, hidden]: the MLP's first layer of the state, without the position. address
    [B, T, match]: what the current token's query is compared with.
    """

    key: Tensor
    address: Tensor


class Controller(nn.Module):
    """sigma(i; t) = sigmoid(MLP(z_i + p) + <A z_i, Q z_t>), z_i = GRU(x_i, z_{i-1}).

    x is the language model's own embedding, frozen. The MLP over state and position is the paper's
    (as far as it is known); the comparison with the current token's state is ours. Without it, and
    with absolute positions, scores never change: the method is then a static top-(m + R).
    """

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__()
        self.config = config
        h, m, n = config.hidden, config.match, config.layers
        self.gru = nn.GRU(config.width, h, batch_first=True) if config.state == "gru" else None
        self.token = nn.Linear(config.width, h) if config.state == "token" else None
        self.inner = nn.Linear(h, h)
        self.places = nn.Embedding(BUCKETS, h) if config.position != "none" else None
        self.score = nn.Linear(h, n)
        self.address = nn.Linear(h, m) if m else None
        self.query = nn.Linear(h, n * m) if m else None

    def states(self, embedded: Tensor, last: Tensor | None = None) -> Tensor:
        """Return the states z [B, T, hidden] of tokens whose embeddings are [B, T, width].

        Args: last: [B, hidden], of the token before them; None: there is none.
        """
        x = self._normed(embedded)
        if self.gru is None:
            assert self.token is not None
            return torch.tanh(self.token(x))
        z: Tensor = self.gru(x, None if last is None else last.unsqueeze(0).contiguous())[0]
        return z

    def incoming(self, embedded: Tensor) -> Tensor:
        """Return tokens [B, width] as `kvlab.kernels.adore.advance` takes them in."""
        x = self._normed(embedded)
        if self.gru is None:
            assert self.token is not None
            return torch.as_tensor(self.token(x))
        weight, _, bias, _ = self.gru.all_weights[0]
        return F.linear(x, weight, bias)

    def asks(self, z: Tensor) -> Tensor:
        """Return the queries [B, layers match] of tokens with states z [B, hidden]."""
        return z[:, :0] if self.query is None else torch.as_tensor(self.query(z))

    def remember(self, z: Tensor) -> Memory:
        """Return what scores will need of tokens with states z [B, T, hidden]."""
        address = z[..., :0] if self.address is None else self.address(z)
        return Memory(self.inner(z), address)

    def logits(
        self,
        memory: Memory,
        z: Tensor,
        positions: Tensor,
        current: Tensor,
        layers: slice = slice(None),
    ) -> Tensor:
        """Score remembered tokens for current ones.

        Args:
            memory: of tokens [B, S].
            z: [B, T, hidden], states of the current tokens.
            positions: [B or 1, S], where the remembered stand; current: [B or 1, T].
            layers: of those that it scores for.

        Returns:
            [B, L, T, S] logits; what stands after the current token means nothing.
        """
        key = memory.key.unsqueeze(1)
        if self.places is not None:
            back = current.unsqueeze(2) - positions.unsqueeze(1)
            place = back if self.config.position == "relative" else positions.unsqueeze(1)
            table = F.linear(self.places.weight, self.inner.weight)
            key = key + F.embedding(buckets(place), table)
        found = F.linear(F.relu(key), self.score.weight[layers], self.score.bias[layers])
        found = found.movedim(-1, 1)
        if self.query is not None:
            query = self.query(z).unflatten(-1, (self.config.layers, -1))[:, :, layers]
            match = query.transpose(1, 2) @ memory.address.unsqueeze(1).transpose(2, 3)
            found = found + match * self.config.match**-0.5
        return found.expand(-1, -1, z.shape[1], -1)

    def forward(self, embedded: Tensor, current: Tensor) -> Tensor:
        """Score all tokens of texts for some of them.

        Args:
            embedded: [B, T, width], the language model's embeddings.
            current: [B, Q], the tokens that they are scored for.

        Returns:
            [B, L, Q, T] logits; what stands after the current token means nothing.
        """
        z = self.states(embedded)
        places = torch.arange(z.shape[1], device=z.device).unsqueeze(0)
        asked = z.gather(1, current.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        return self.logits(self.remember(z), asked, places, current)

    def packed(self) -> tuple[Cell, Head]:
        """Return the weights as kernels take them; those of now."""
        none = self.inner.weight[:0], self.inner.bias[:0]
        address, query = (
            none if part is None else (part.weight, part.bias)
            for part in (self.address, self.query)
        )
        cell = Cell(None, None, self.inner.weight, self.inner.bias, *address, *query)
        if self.gru is not None:
            _, weight, _, bias = self.gru.all_weights[0]
            cell = cell._replace(hidden=weight, hidden_bias=bias)
        if self.places is None:
            return cell, Head(self.score.weight, self.score.bias)
        table = F.linear(self.places.weight, self.inner.weight)
        begun = edges().to(table.device)
        relative = self.config.position == "relative"
        return cell, Head(self.score.weight, self.score.bias, table, begun, relative)

    def _normed(self, embedded: Tensor) -> Tensor:
        return F.layer_norm(embedded.to(self.score.weight.dtype), embedded.shape[-1:])

    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def save(self, folder: Path) -> None:
        """Write `controller.safetensors` and `controller.json` into an existing folder."""
        from safetensors.torch import save_file

        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=1) + "\n")


def buckets(places: Tensor) -> Tensor:
    """Number distances or positions: each its own at first, then ever wider ranges."""
    exact = BUCKETS // 2
    far = places.clamp(exact, FARTHEST).float()
    doublings = torch.log2(far / exact) / torch.log2(torch.tensor(FARTHEST / exact))
    wide = exact + (doublings * (BUCKETS - exact - 1)).long()
    return torch.where(places < exact, places.clamp_min(0), wide)


def edges() -> Tensor:
    """Return where each of the `buckets` but the first begins: [BUCKETS - 1]."""
    return torch.searchsorted(buckets(torch.arange(FARTHEST + 1)), torch.arange(1, BUCKETS))


def load(folder: Path, device: torch.device) -> Controller:
    """Return a saved controller, frozen, in float32.

    Raises:
        KvlabError: the folder holds none, or a broken one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    controller = Controller(config_of(folder))
    try:
        controller.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise KvlabError(f"{folder / WEIGHTS}: is no whole ADORE controller ({error})") from None
    return controller.to(device).eval().requires_grad_(False)
