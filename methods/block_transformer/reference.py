"""Weights of the authors' implementation (itsnamgyu/block-transformer) as a kvlab model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.decoder.config import DecoderConfig, gpt_neox
from kvlab.methods.registry import resolve

UNUSED = re.compile(
    r"block_decoder\.gpt_neox\.embed_in\.weight"  # made by the base class, never read (fact 1.3)
    r"|.*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"  # buffers of older transformers
)
LAYER = {
    "input_layernorm": "attention_norm",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
TABLES = {
    "embedder.embeddings.weight": "embedder.table.weight",
    "embedder.projection_layer.weight": "embedder.projection.weight",
    "embedder.projection_layer.bias": "embedder.projection.bias",
    "token_decoder.expansion_layer.weight": "token_decoder.expansion.linear.weight",
    "token_decoder.expansion_layer.bias": "token_decoder.expansion.linear.bias",
    "token_decoder.gpt_neox.embed_in.weight": "token_decoder.decoder.embedding.weight",
    "token_decoder.embed_out.weight": "token_decoder.decoder.output.weight",
}


class ReferenceCheckpointError(KvlabError):
    """A state dict that is not one of the reference's, or a variant that is not imported."""


def from_reference(
    state: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    token_heads: int | None = None,
    rotary_fraction: float = 0.25,
    rope_theta: float = 10000.0,
    token_decoder: Literal["prefix", "summation"] = "prefix",  # noqa: S107
    max_positions: int = 2048,
) -> BlockTransformer:
    """Return the model that a state dict of the reference holds, lookup embedders only.

    Sizes are read from the tensors; the arguments are what a state dict does not say.

    Args:
        state: tensors by the reference's names.
        heads, token_heads: of the two decoders; None: the reference's rule (size 32 up to width
            256, 64 up to 1536, else 128), and `heads` for a token decoder of the same width.
        rotary_fraction, rope_theta: of both decoders.
        token_decoder: "prefix" or "summation".
        max_positions: tokens of a sequence it was trained on.

    Raises:
        ReferenceCheckpointError: a tensor is missing, left over or of another shape.
    """
    state = {name: tensor for name, tensor in state.items() if not UNUSED.fullmatch(name)}
    table = _get(state, "embedder.embeddings.weight")
    width = _get(state, "block_decoder.gpt_neox.final_layer_norm.weight").numel()
    token_width = _get(state, "token_decoder.gpt_neox.final_layer_norm.weight").numel()
    expansion = _get(state, "token_decoder.expansion_layer.weight")
    vectors = expansion.shape[0] // token_width
    counts = [_layers(state, f"{part}_decoder") for part in ("block", "token")]
    heads = heads or width // _head_dim(width)
    if token_heads is None:
        token_heads = heads if token_width == width else token_width // _head_dim(token_width)
    if width % heads or token_width % token_heads:
        raise ReferenceCheckpointError(
            f"{heads} and {token_heads} heads do not divide the widths {width} and {token_width}: "
            "give the checkpoint's own numbers of heads"
        )
    config = DecoderConfig(
        vocab_size=table.shape[0],
        max_positions=max_positions,
        rope_theta=rope_theta,
        **gpt_neox(width, sum(counts), heads) | {"rotary_fraction": rotary_fraction},
    )
    params: dict[str, Any] = {
        "block_layers": counts[0],
        "token_layers": counts[1],
        "token_decoder": token_decoder,
        "prefix_length": vectors if token_decoder == "prefix" else 1,
        **_embedder(state, table, width),
    }
    if (token_width, token_heads) != (width, heads):
        params |= {"token_width": token_width, "token_heads": token_heads}
    model = BlockTransformer(config, resolve({"block_transformer": params}))
    tensors = dict(_renamed(state, model))
    if state:
        raise ReferenceCheckpointError(f"tensors of a variant that is not imported: {list(state)}")
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if shape != _shape(tensors.get(name))]
    if wrong:
        raise ReferenceCheckpointError(
            f"tensors missing or of another shape, by kvlab's names: {', '.join(wrong)}"
        )
    model.load_state_dict(tensors)
    return model


def take_neox(state: dict[str, Tensor], prefix: str, heads: int) -> Iterator[tuple[str, Tensor]]:
    """Take layers and final norm below `prefix` (a GPT-NeoX) out of `state`, by our names.

    Fused projections, per head [q; k; v] there, are all queries, all keys, all values here.
    """
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", own)
        if found and found[2] in LAYER:
            tensor = state.pop(name)
            if found[2].endswith("query_key_value"):
                tensor = torch.unflatten(tensor, 0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            yield f"layers.{found[1]}.{LAYER[found[2]]}.{found[3]}", tensor
        elif own.startswith("final_layer_norm."):
            yield own.removeprefix("final_layer_"), state.pop(name)


def _renamed(state: dict[str, Tensor], model: BlockTransformer) -> Iterator[tuple[str, Tensor]]:
    sizes = model.sizes
    for part, heads, ours in (
        ("block", sizes.block.heads, "block_decoder"),
        ("token", sizes.token.heads, "token_decoder.decoder"),
    ):
        for name, tensor in take_neox(state, f"{part}_decoder.gpt_neox.", heads):
            yield f"{ours}.{name}", tensor
    for theirs, name in TABLES.items():
        if theirs in state:
            tensor = state.pop(theirs)
            if theirs.endswith("projection_layer.weight"):
                # A convolution over the block [D, d, L_B] is a linear map of its concatenated rows.
                tensor = tensor.transpose(1, 2).flatten(1)
            if theirs.endswith("expansion_layer.weight"):
                tensor = tensor.squeeze(-1)
            yield name, tensor


def _embedder(state: Mapping[str, Tensor], table: Tensor, width: int) -> dict[str, Any]:
    kernel = state.get("embedder.projection_layer.weight")
    if kernel is not None and kernel.dim() == 3:
        return {
            "embedder": "projection",
            "embedding_width": kernel.shape[1],
            "block_length": kernel.shape[2],
        }
    if width % table.shape[1]:
        raise ReferenceCheckpointError(
            f"rows of {table.shape[1]} do not add up to the width {width}; there is no projection"
        )
    return {"embedder": "lookup", "block_length": width // table.shape[1]}


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    pattern = re.compile(rf"{part}\.gpt_neox\.layers\.(\d+)\.")
    return 1 + max((int(m[1]) for name in state if (m := pattern.match(name))), default=-1)


def _head_dim(width: int) -> int:
    return 32 if width <= 256 else 64 if width <= 1536 else 128


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ReferenceCheckpointError(f"no tensor '{name}': not a lookup model of the reference")
    return state[name]
