"""What can be chosen about sharing keys and values. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from kvlab.methods.axis import MethodError, Range
from kvlab.methods.decoder.config import DecoderConfig, Sharing
from kvlab.methods.sharing.layer_types import LayerTypes, read_layer_types, write_layer_types
from kvlab.methods.sharing.layouts import Layout, cla_map, keep_first, kv_map, lckv_map, yoco_map

Count = Annotated[int, Range(1, 512)]
Window = Annotated[int, Range(1, 1048576, log=True)]


class Map(NamedTuple):
    """Attributes: kv_of: the layer each layer reads. windows: tokens it sees; None: no limit."""

    kv_of: tuple[int, ...]
    windows: tuple[int | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class SharingParams(ABC):
    """The parameters of a value of the sharing axis."""

    @abstractmethod
    def shape(self, config: DecoderConfig) -> DecoderConfig:
        """Return the decoder with its keys and values shared; raise a MethodError if it cannot."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong whatever the decoder."""
        return iter(())


@dataclass(frozen=True, slots=True)
class OwnParams(SharingParams):
    """Every layer reads its own keys and values."""

    def shape(self, config: DecoderConfig) -> DecoderConfig:
        return config


@dataclass(frozen=True, slots=True)
class GqaParams(SharingParams):
    """Each layer keeps its own keys and values, with fewer heads.

    Attributes:
        kv_heads: 1 is multi-query attention; None: half as many as the model has.
    """

    kv_heads: Count | None = None

    def shape(self, config: DecoderConfig) -> DecoderConfig:
        if self.kv_heads is None and config.kv_heads % 2:
            raise MethodError(
                f"kv_heads: the model's {config.kv_heads} cannot be halved: give a number that "
                "divides it"
            )
        return pooled(config, self.kv_heads or config.kv_heads // 2)


@dataclass(frozen=True, slots=True)
class AcrossLayersParams(SharingParams):
    """What all ways of sharing across layers have.

    Attributes:
        kv_heads: key/value heads of a KV layer; None: as many as the model has.
        merge: what a KV layer's maps to keys and values start as when a model is converted: the
            `mean` over the layers that will read it, or `pick`, its own. Heads that become one are
            averaged either way.
        strict: no layer lets a token read its own keys and values, as the original LCKV (otherwise
            only layers that read from above themselves).
    """

    kv_heads: Count | None = None
    merge: Literal["mean", "pick"] = "mean"
    strict: bool = False

    @abstractmethod
    def map(self, layers: int) -> Map:
        """Return the map of a decoder of so many layers; raise a MethodError if it has none."""

    def passes(self) -> dict[str, Any]:
        """Return the settings of `Sharing` that only maps which may read upward have."""
        return {}

    def shape(self, config: DecoderConfig) -> DecoderConfig:
        """Return the decoder with its keys and values shared.

        A window of the sharing narrows one that the decoder has.
        """
        kv_of, windows = self.map(config.layers)
        if windows is not None and config.windows is not None:
            windows = tuple(map(_narrower, windows, config.windows))
        return pooled(config, self.kv_heads or config.kv_heads).with_(
            windows=windows or config.windows,
            sharing=Sharing(kv_of, strict=self.strict, **self.passes()),
        )


@dataclass(frozen=True, slots=True)
class UpwardParams(AcrossLayersParams):
    """What those have whose layers may read from above themselves.

    Attributes:
        forward_passes, backward_passes: how often such layers are run in training (and over a
            prompt): m times without gradient, then b times with.
        sequential: train token by token, exactly as decoding does.
        keep_first: layer 0 reads itself, whatever else is said: one KV layer more where it did not.
    """

    forward_passes: Annotated[int, Range(0, 1024)] = 7
    backward_passes: Annotated[int, Range(1, 1024)] = 2
    sequential: bool = False
    keep_first: bool = False

    def passes(self) -> dict[str, Any]:
        return {
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "sequential": self.sequential,
        }

    def first_kept(self, kv_of: tuple[int, ...]) -> tuple[int, ...]:
        """Return the map as `keep_first` wants it."""
        return keep_first(kv_of) if self.keep_first else kv_of


@dataclass(frozen=True, slots=True)
class CrossLayerParams(UpwardParams):
    """Any sharing across layers: one of nine layouts, or every layer's KV layer.

    Attributes:
        layout: where the layers that share lie, and which of them is read; None without `layers`:
            `pizza_bottom`.
        kv_layers: how many layers a layout leaves with keys and values of their own; None: half of
            them, rounded up.
        layers: the layer that each layer reads, as a list or as text ("0_1s_8_8"), where an `s`
            gives the layer a sliding window.
        window: the tokens which those see, their own included.
    """

    layout: Layout | None = None
    kv_layers: Count | None = None
    layers: str | tuple[int, ...] | None = None
    window: Window | None = None

    def __post_init__(self) -> None:
        """Give every choice one spelling: identities are made of it."""
        if self.layers is None:
            object.__setattr__(self, "layout", self.layout or "pizza_bottom")
            return
        written = self.layers if isinstance(self.layers, str) else write_layer_types(self.layers)
        object.__setattr__(self, "layers", write_layer_types(*read_layer_types(written)))

    def problems(self) -> Iterator[str]:
        if self.layers is not None:
            for name in ("layout", "kv_layers"):
                if (found := getattr(self, name)) is not None:
                    yield f"{name}: `layers` says it all: leave out {name} ({found}) or layers"
        windowed = self.layers is not None and any(self._written().windowed)
        if self.window is not None and not windowed:
            yield "window: no layer is marked with an 's' in `layers`: leave it out"
        if windowed and self.window is None:
            yield "window: must be given, in tokens, for the layers marked with an 's'"

    def map(self, layers: int) -> Map:
        if self.layout is not None:
            kv_layers = -(-layers // 2) if self.kv_layers is None else self.kv_layers
            return Map(self.first_kept(kv_map(self.layout, layers, kv_layers)))
        kv_of, windowed = self._written()
        if len(kv_of) != layers:
            raise MethodError(f"layers: has {len(kv_of)} entries, the decoder has {layers} layers")
        for layer, kv in enumerate(kv_of):
            if kv >= layers:
                raise MethodError(
                    f"layers: layer {layer} reads layer {kv}: must be from 0 to {layers - 1}"
                )
        windows = tuple(self.window if flag else None for flag in windowed)
        return Map(self.first_kept(kv_of), windows if any(windowed) else None)

    def _written(self) -> LayerTypes:
        return read_layer_types(str(self.layers))


@dataclass(frozen=True, slots=True)
class LckvParams(UpwardParams):
    """LCKV: the layers between the warm-up layers read the top one of them.

    Attributes:
        warmup_layers: layers with keys and values of their own, half at the bottom, half at the
            top.
    """

    warmup_layers: Annotated[int, Range(0, 511)] = 2

    def map(self, layers: int) -> Map:
        return Map(self.first_kept(lckv_map(layers, self.warmup_layers)))


@dataclass(frozen=True, slots=True)
class ClaParams(AcrossLayersParams):
    """Cross-layer attention (CLA): neighbouring layers read the lowest of them.

    Attributes:
        group: layers that share, n of CLA-n; the topmost group has what is left.
        leading: layers below the first group, with keys and values of their own.
    """

    group: Count = 2
    leading: Annotated[int, Range(0, 511)] = 0

    def map(self, layers: int) -> Map:
        return Map(cla_map(layers, self.group, self.leading))


@dataclass(frozen=True, slots=True)
class YocoParams(AcrossLayersParams):
    """YOCO: lower layers see a window, upper layers all of one layer's keys and values.

    Attributes:
        window: tokens that a lower layer sees, its own included.
        kv_layers: lower layers and the one that the upper layers read; None: half of the layers,
            and one.
    """

    window: Window = 1024
    kv_layers: Count | None = None

    def map(self, layers: int) -> Map:
        kv_of = yoco_map(layers, self.kv_layers)
        shared = max(kv_of)
        return Map(kv_of, tuple(self.window if i < shared else None for i in range(layers)))


def pooled(config: DecoderConfig, kv_heads: int) -> DecoderConfig:
    """Return the decoder with so many key/value heads, each in place of a group of its own.

    Raises:
        MethodError: heads that cannot be grouped.
    """
    if config.kv_heads % kv_heads:
        raise MethodError(
            f"kv_heads: must divide the model's {config.kv_heads} key/value heads, found {kv_heads}"
        )
    return config.with_(kv_heads=kv_heads)


def _narrower(one: int | None, other: int | None) -> int | None:
    return min((w for w in (one, other) if w is not None), default=None)
