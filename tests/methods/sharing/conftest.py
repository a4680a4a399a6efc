"""What sharing must come out as: one token after another, in float64, without masks or batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab.methods.decoder.config import DecoderConfig, Sharing
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.model import Decoder

MAPS = {
    "pizza-bottom": (0, 1, 2, 2, 2, 2),
    "pizza-middle": (0, 1, 4, 4, 4, 4),
    "pizza-top": (0, 1, 5, 5, 5, 5),
    "sandwich-bottom": (0, 1, 1, 1, 1, 5),
    "sandwich-middle": (0, 3, 3, 3, 3, 5),
    "sandwich-top": (0, 4, 4, 4, 4, 5),
    "lasagna-bottom": (0, 0, 2, 2, 4, 4),
    "lasagna-middle": (1, 1, 1, 4, 4, 4),
    "lasagna-top": (1, 1, 3, 3, 5, 5),
    "crossing": (2, 3, 2, 5, 0, 1),
    "all-up": (5, 5, 5, 5, 5, 5),
}
"""Every layout at six layers, and two that no paper has."""

Rows = dict[int, list[tuple[Tensor, Tensor]]]
"""KV layer -> the keys and values [H_kv, D] of its tokens, by position."""


class Slow:
    """A decoder in plain loops, written from the papers' definitions (arXiv 2410.14442).

    Args:
        weights: named as in `Decoder`.
        window: tokens that a query may read at most, whatever the layer.
    """

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, Tensor], window: int | None = None
    ) -> None:
        self.config = config
        self.weights = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
        self.window = window or config.max_positions

    def exact(self, ids: Tensor, rows: Rows | None = None) -> Tensor:
        """Logits [T, V] of ids [T], token by token through all layers; `rows` go on growing."""
        rows = {layer: [] for layer in self.config.kv_layers} if rows is None else rows
        begun = len(rows[self.config.kv_layers[0]])
        out = []
        for position, token in enumerate(ids.tolist(), begun):
            x = self.weights["embedding.weight"][token]
            for layer in range(self.config.layers):
                x = self.layer(layer, x, position, rows)
            out.append(x)
        return self.head(out)

    def passes(self, ids: Tensor, forward: int, backward: int) -> tuple[Tensor, Rows]:
        """Logits [T, V] of ids [T] by passes, and the rows of the last: what training computes."""
        xs = list(self.weights["embedding.weight"][ids])
        rows: Rows = {layer: [] for layer in self.config.kv_layers}
        for layers in spans(self.config.kv_of):
            entering, count = xs, forward + backward if len(layers) > 1 else 1
            for left in reversed(range(count)):
                with torch.set_grad_enabled(len(layers) == 1 or left < backward):
                    xs = entering
                    for layer in layers:
                        if layer in rows:
                            rows[layer] = []
                        xs = [self.layer(layer, x, p, rows) for p, x in enumerate(xs)]
        return self.head(xs), rows

    def layer(self, layer: int, x: Tensor, position: int, rows: Rows) -> Tensor:
        """Run a layer on one token's x [W]; a KV layer adds its keys and values to `rows`."""
        c, name = self.config, f"layers.{layer}"
        assert c.sharing is not None
        normed = self.norm(x, f"{name}.attention_norm")
        mapped = self.linear(normed, f"{name}.attention.qkv").view(-1, c.head_dim)
        q = self.rotate(self.head_norm(mapped[: c.heads], f"{name}.attention.q_norm"), position)
        if layer in rows:
            k, v = mapped[c.heads :].split(c.kv_heads)
            k = self.rotate(self.head_norm(k, f"{name}.attention.k_norm"), position)
            rows[layer].append((k, v))
        else:
            assert len(mapped) == c.heads
        own = c.windows[layer] if c.windows else None
        first = max(0, position + 1 - min(self.window, own or self.window))
        upward = c.kv_of[layer] > layer
        last = position if upward or c.sharing.strict else position + 1
        read = rows[c.kv_of[layer]][first:last]
        attended = torch.zeros_like(q)
        if read:
            k, v = (torch.stack(some).repeat_interleave(len(q) // c.kv_heads, 1)
                    for some in zip(*read, strict=True))  # fmt: skip
            shares = (torch.einsum("hd,shd->sh", q, k) / c.head_dim**0.5).softmax(0)
            attended = torch.einsum("sh,shd->hd", shares, v)
        after = x + self.linear(attended.flatten(), f"{name}.attention.out")
        h = self.norm(x if c.parallel else after, f"{name}.mlp_norm")
        if c.gated:
            inner = F.silu(self.linear(h, f"{name}.mlp.gate")) * self.linear(h, f"{name}.mlp.up")
        else:
            inner = F.gelu(self.linear(h, f"{name}.mlp.up"))
        return after + self.linear(inner, f"{name}.mlp.down")

    def head(self, xs: list[Tensor]) -> Tensor:
        return self.linear(self.norm(torch.stack(xs), "norm"), "output")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self.weights[f"{name}.weight"], self.config.norm_eps
        if self.config.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], weight, self.weights[f"{name}.bias"], eps)
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def head_norm(self, x: Tensor, name: str) -> Tensor:
        if not self.config.qk_norm:
            return x
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.norm_eps)

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Turn the pairs (i, i + half) of each head [H, D]; angles in float32, as models train."""
        half = self.config.rotary_dim // 2
        angles = position / self.config.rope_theta ** (torch.arange(0.0, half) / half)
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), 1)


def spans(kv_of: tuple[int, ...]) -> Iterator[list[int]]:
    """Cut the layers where no layer reads upward across; what stays together is run in passes."""
    upward = [(layer, kv) for layer, kv in enumerate(kv_of) if kv > layer]
    cuts = [cut for cut in range(len(kv_of) + 1) if not any(a < cut <= b for a, b in upward)]
    return (list(range(a, b)) for a, b in pairwise(cuts))


@pytest.fixture(params=MAPS.values(), ids=list(MAPS))
def kv_of(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """Each layout in turn: the layer that every one of six layers reads."""
    kv_of: tuple[int, ...] = request.param
    return kv_of


@pytest.fixture
def shared(tiny: Callable[..., TokenModel]) -> Callable[..., TokenModel]:
    """A function from a family, a map, changes of `Sharing` and windows to a tiny model.

    In float64: layer after layer upward, float32 would lose what the tests look at.
    """

    def build(family: str, kv_of: tuple[int, ...], windows: Any = None, **rest: Any) -> TokenModel:
        sharing = Sharing(kv_of, **rest)
        return tiny(family, layers=len(kv_of), sharing=sharing, windows=windows).double()

    return build


@pytest.fixture
def slow() -> Callable[..., Slow]:
    """A function from a decoder (and `window`) to its twin in plain loops."""
    return lambda decoder, window=None: Slow(
        decoder.config, dict(nn.Module.named_parameters(decoder)), window
    )


@pytest.fixture
def twin() -> type[Slow]:
    """The decoder in plain loops, for weights that no `Decoder` holds."""
    return Slow


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    """A function from a decoder and ids [B, T] to the logits of one parallel pass."""

    def run(decoder: Decoder, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        return decoder.head(decoder.body(decoder.embed(ids), positions, ids=ids))

    return run
