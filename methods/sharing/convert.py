"""From a trained decoder's layers to layers that share keys and values (uptraining)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.layers import Attention, Layer
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.sharing.values import unpoolable

Merge = Literal["mean", "pick"]
MADE_ANEW = ("attention.qkv.", "attention.k_norm.")
"""Where the names of a layer's tensors begin that depend on whose keys and values are read."""


class Started(NamedTuple):
    """What layers start as.

    Attributes:
        tensors: by name, counted from the list of layers ("0.attention.qkv.weight").
        merged: names of those that hold means of the parent's values instead of its own.
    """

    tensors: dict[str, Tensor]
    merged: frozenset[str]


def merge_of(method: Method) -> Merge:
    """Return how a method's sharing merges keys and values; one that merges none: `mean`."""
    merge: Merge = getattr(method["sharing"].params, "merge", "mean")
    return merge


@torch.no_grad()
def start_layers(
    config: DecoderConfig, parent: Decoder, origin: Sequence[int], merge: Merge
) -> Started:
    """Return what the layers of a decoder start as.

    Queries, outputs, feed-forward layers and norms are the parent's. What maps to the keys and
    values of a KV layer is made of those that its readers read in the parent (arXiv 2406.09297 for
    the mean); heads that become one are averaged (arXiv 2305.13245).

    Args:
        config: of the decoder that is started; its kv_heads must divide the parent's.
        parent: may share keys and values itself, in another way.
        origin: the parent's layer that each layer is made of.
        merge: `mean` over all readers of a KV layer; `pick`: the one at its own place.

    Raises:
        KvlabError: heads that cannot be pooled.
    """
    for problem in unpoolable(config, parent.config):
        raise KvlabError(problem)
    layers = cast(Sequence[Layer], parent.layers)
    tensors: dict[str, Tensor] = {}
    merged: set[str] = set()
    for layer, taken in enumerate(origin):
        own = layers[taken].state_dict()
        tensors |= {
            f"{layer}.{name}": tensor.clone()
            for name, tensor in own.items()
            if not name.startswith(MADE_ANEW)
        }
        readers = [i for i, kv in enumerate(config.kv_of) if kv == layer]
        if readers and merge == "pick":
            readers = [layer]
        sources = [layers[parent.config.kv_of[origin[i]]].attention for i in readers]
        made, exact = _attention(layers[taken].attention, sources, config.kv_heads)
        tensors |= {f"{layer}.attention.{name}": tensor for name, tensor in made.items()}
        merged |= {f"{layer}.attention.{name}" for name in set(made) - exact}
    return Started(tensors, frozenset(merged))


def _attention(
    queries: Attention, sources: Sequence[Attention], kv_heads: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Make `qkv` and `k_norm` of one layer; also return the names that hold plain copies.

    Args:
        queries: of the layer it is made of.
        sources: layers whose keys and values it is to have, once per reader; none: no such rows.
        kv_heads: that it is to have.
    """
    made: dict[str, Tensor] = {}
    exact: set[str] = set()
    alike = len({id(source) for source in sources}) < 2
    for name in ("weight", "bias"):
        if getattr(queries.qkv, name) is None:
            continue
        rows = getattr(queries.qkv, name)[: queries.heads * queries.head_dim]
        groups = [_pool(_keys_values(source, name), kv_heads) for source in sources]
        made[f"qkv.{name}"] = torch.cat([rows, *_mean(groups)])
        if alike and all(source.kv_heads == kv_heads for source in sources):
            exact.add(f"qkv.{name}")
    norms = [source.k_norm.weight for source in sources if source.k_norm is not None]
    for weight in _mean(norms):
        made["k_norm.weight"] = weight.clone()
        if alike:
            exact.add("k_norm.weight")
    return made, exact


def _keys_values(source: Attention, name: str) -> Tensor:
    """The rows of a KV layer's `qkv` that make keys and values: [2, kv_heads, D, ...]."""
    rows: Tensor = getattr(source.qkv, name)[source.heads * source.head_dim :]
    return torch.unflatten(rows, 0, (2, source.kv_heads, source.head_dim))


def _pool(rows: Tensor, kv_heads: int) -> Tensor:
    """Average neighbouring heads until `kv_heads` are left; return the rows flat, as in `qkv`."""
    if rows.shape[1] != kv_heads:
        rows = _average(torch.unflatten(rows, 1, (kv_heads, -1)), dim=2)
    return rows.flatten(0, 2)


def _mean(tensors: Sequence[Tensor]) -> Iterable[Tensor]:
    """The mean, as a list of one; of none, none; of equal tensors, exactly that tensor."""
    if not tensors or all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        return tensors[:1]
    return [_average(torch.stack(tuple(tensors)), dim=0)]


def _average(tensor: Tensor, dim: int) -> Tensor:
    """The mean over a dimension, summed in float32 at least."""
    exact = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.mean(dim=dim, dtype=exact).to(tensor.dtype)
