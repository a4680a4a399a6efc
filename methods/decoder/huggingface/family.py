"""What a family of checkpoints is to us: its settings and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvlab.methods.decoder.config import DecoderConfig, RopeScaling
from kvlab.methods.decoder.huggingface.settings import Settings

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""hidden_act -> DecoderConfig.activation."""

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True, slots=True)
class Names:
    """One of our tensors and theirs: several are stacked along the first dimension.

    per_head: theirs holds q, k and v of head 0, then of head 1, and so on (GPT-NeoX).
    """

    ours: str
    theirs: tuple[str, ...]
    per_head: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One supported architecture.

    Attributes:
        architecture: its class name in config.json. model_type: its other name there.
        read: settings -> our config, keys and values shared; refuses what it does not support.
        write: our config -> settings; `read` of it shows whether the family can say it all.
        names: every tensor of a decoder of this config.
        ignored: endings of tensors that old checkpoints carry and nothing needs.
        discarded: tensors that checkpoints of this config may carry and the architecture drops.
    """

    architecture: str
    model_type: str
    read: Callable[[Settings], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    names: Callable[[DecoderConfig], Iterator[Names]]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    discarded: Callable[[DecoderConfig], frozenset[str]] = lambda config: frozenset()


def linear(ours: str, *theirs: str, bias: bool, per_head: bool = False) -> Iterator[Names]:
    """The weight of a linear map, and its bias where it has one."""
    for part in ("weight", "bias") if bias else ("weight",):
        yield Names(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), per_head)


def token_ids(settings: Settings, vocabulary: int) -> dict[str, int]:
    """The ids that a config keeps; without one for padding the end of text stands there."""
    end = settings.token("eos_token_id", vocabulary, 0)
    return {
        "bos_id": settings.token("bos_token_id", vocabulary, 0),
        "pad_id": settings.token("pad_token_id", vocabulary, end),
    }


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` entry of config.json."""
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    return written
