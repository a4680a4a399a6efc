"""The one decoder's sizes. Imports nothing but the standard library."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from kvlab import KvlabError


class ConfigError(KvlabError):
    """Sizes that make no decoder."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained length.

    kind "linear" divides positions by factor; "llama3" is Llama 3.1's band-wise rule.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which layers own keys and values, and how those that read upward are run.

    A layer whose keys come from above it cannot wait for them: its rows are run in passes, each of
    which reads the keys of the one before (arXiv 2405.10637).

    Attributes:
        kv_of: the layer whose keys and values each layer reads. Those that no layer reads own none.
        strict: no layer lets a token read itself (the original LCKV; otherwise only upward ones).
        forward_passes, backward_passes: m passes without gradient, then b with.
        sequential: train and score token by token, exactly as decoding does.
    """

    kv_of: tuple[int, ...]
    strict: bool = False
    forward_passes: int = 7
    backward_passes: int = 2
    sequential: bool = False


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and choices of a decoder; covers Llama, Mistral, Qwen and GPT-NeoX.

    Attributes:
        width: residual stream. ffn_width: inner size of the feed-forward layer.
        heads, kv_heads, head_dim: query heads, key/value heads, size of each.
        gated: SwiGLU-style gate (activation "silu") against a plain two-layer MLP ("gelu").
        parallel: attention and MLP both read the layer's input (GPT-NeoX).
        rotary_fraction: leading share of each head that is rotated.
        windows: per layer attention window in tokens, None for full attention.
        bos_id, pad_id: what a method puts before text, and where there is none, as the checkpoint's
            tokenizer has them.
        sharing: layers that share keys and values; None: each has its own. A method's doing: no
            checkpoint of the families brings it.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    parallel: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary_fraction: float = 1.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] | None = None
    init_std: float = 0.02
    bos_id: int = 0
    pad_id: int = 0
    sharing: Sharing | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, found {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads: must divide heads ({self.heads}), found {self.kv_heads}")
        if self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_fraction: rotates {self.rotary_dim} dimensions; must be even"
            )
        if self.windows is not None and len(self.windows) != self.layers:
            raise ConfigError(f"windows: needs one entry per layer ({self.layers})")
        for name in ("bos_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name}: must be below vocab_size, found {getattr(self, name)}")
        if any(window is not None and window < 1 for window in self.windows or ()):
            raise ConfigError(f"windows: must be at least 1, found {self.windows}")
        if self.sharing is not None:
            self._check_sharing(self.sharing)

    def _check_sharing(self, sharing: Sharing) -> None:
        if len(sharing.kv_of) != self.layers:
            raise ConfigError(
                f"sharing: names a KV layer for {len(sharing.kv_of)} layers, the decoder has "
                f"{self.layers}"
            )
        for layer, kv in enumerate(sharing.kv_of):
            if not 0 <= kv < self.layers:
                raise ConfigError(
                    f"sharing: layer {layer} reads layer {kv}: must be from 0 to {self.layers - 1}"
                )
        if sharing.forward_passes < 0 or sharing.backward_passes < 1:
            raise ConfigError(
                "sharing: forward_passes must be at least 0 and backward_passes at least 1, found "
                f"{sharing.forward_passes} and {sharing.backward_passes}"
            )

    @property
    def kv_of(self) -> tuple[int, ...]:
        """The layer whose keys and values each layer reads."""
        return tuple(range(self.layers)) if self.sharing is None else self.sharing.kv_of

    @property
    def upward(self) -> bool:
        """Whether a layer reads keys and values from above it."""
        return any(kv > layer for layer, kv in enumerate(self.kv_of))

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that own keys and values, in order."""
        return tuple(sorted(set(self.kv_of)))

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)

    def with_(self, **changes: Any) -> DecoderConfig:
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> DecoderConfig:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ConfigError(f"unknown decoder settings: {', '.join(unknown)}")
        raw = dict(raw)
        if isinstance(raw.get("rope_scaling"), dict):
            raw["rope_scaling"] = RopeScaling(**raw["rope_scaling"])
        if raw.get("windows") is not None:
            raw["windows"] = tuple(raw["windows"])
        if isinstance(raw.get("sharing"), dict):
            shared = raw["sharing"]
            raw["sharing"] = Sharing(**{**shared, "kv_of": tuple(shared["kv_of"])})
        return cls(**raw)


def llama(
    width: int, layers: int, heads: int, kv_heads: int, ffn_width: int, **rest: Any
) -> dict[str, Any]:
    """Sizes of the Llama family: RMSNorm, SwiGLU, rotary over the whole head, no biases."""
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width // heads,
        "ffn_width": ffn_width,
        **rest,
    }


def gpt_neox(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Sizes of the GPT-NeoX family: LayerNorm, GELU, biases, parallel residual, partial rotary."""
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "ffn_width": 4 * width,
        "norm": "layer",
        "activation": "gelu",
        "gated": False,
        "parallel": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "rotary_fraction": 0.25,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "nano": llama(128, 4, 4, 4, 352, tie_embeddings=True, init_std=0.08),
    "micro": llama(256, 6, 8, 8, 704, tie_embeddings=True, init_std=0.06),
    "mini": llama(512, 8, 8, 8, 1408),
    "pythia-5m": gpt_neox(256, 6, 8),
    "pythia-19m": gpt_neox(512, 6, 8),
    "pythia-85m": gpt_neox(768, 12, 12),
    "pythia-302m": gpt_neox(1024, 24, 16),
}
"""Model presets: everything but the vocabulary size, which the tokenizer decides."""
