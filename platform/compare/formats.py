"""Numbers as text: few digits, one unit per number, the spread in the unit of its mean."""

from __future__ import annotations

from math import floor, isfinite, log10

from kvlab.platform.compare.metrics import Metric
from kvlab.platform.compare.model import Change, Cost, Number

_SECONDS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_FLOPS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))
MOST_DIGITS = 9
"""Digits after the point at most."""
TINY = 1e-6
"""Below it a value is written with a power of ten: its digits would be zeros."""
WHOLE_BYTES = 10_240
"""Below this many bytes, bytes are counted out."""


def number_text(metric: Metric, number: Number) -> str:
    """`33.41 ± 0.28`: the mean and, over several seeds, their standard deviation."""
    if number.value is None:
        return number.missing or "—"
    sd = number.sd if number.sd is not None and not metric.exact else None
    return value_text(metric, number.value, sd)


def value_text(metric: Metric, value: float, sd: float | None = None) -> str:
    """A value with its unit, and its spread in the same unit and with the same digits."""
    scale, unit = _scale(metric, value)
    form = f",.{_digits(value / scale, metric)}f"
    if 0 < abs(value / scale) < TINY:
        form = ".2e"
    text = f"{value / scale:{form}}"
    if sd is not None:
        text += f" ± {sd / scale:{form}}"
    return f"{text} {unit}".rstrip()


def seconds_text(seconds: float) -> str:
    return _scaled(seconds, _SECONDS)


def flops_text(flops: float) -> str:
    return _scaled(flops, _FLOPS, suffix="FLOP")


def cost_text(cost: Cost) -> tuple[str, str]:
    """Training time and FLOPs, each as `own` or `own + inherited`."""
    time, work = seconds_text(cost.seconds), flops_text(cost.flops)
    if cost.inherited_flops or cost.inherited_seconds:
        time += f" + {seconds_text(cost.inherited_seconds)}"
        work += f" + {flops_text(cost.inherited_flops)}"
    if cost.checkpoint:
        time += " + checkpoint"
    return time, work


def change_text(metric: Metric, change: Change) -> str:
    """`×1.06 [1.04, 1.08]` or `+0.12 [+0.10, +0.14]`, or that nothing may be said."""
    if change.verdict == "not distinguished":
        return "not distinguished"
    if change.verdict == "equal":
        return "equal"
    return span_text(metric, change)


def span_text(metric: Metric, change: Change) -> str:
    """`×0.99 [0.96, 1.02]`: the ratio or the difference with its interval, whatever it says."""
    if change.ratio is None:
        assert change.difference is not None
        scale = max(abs(v) for v in (change.difference, change.low, change.high) if v is not None)
        text = signed_text(metric, change.difference, scale)
        bounds = [signed_text(metric, v, scale) for v in (change.low, change.high) if v is not None]
    else:
        text = f"×{_ratio(change.ratio)}"
        bounds = [_ratio(v) for v in (change.low, change.high) if v is not None]
    if len(bounds) < 2:
        return f"{text}, no interval"
    if change.low == change.high:
        return text
    # Never broken inside the brackets.
    return f"{text} [{bounds[0]},\N{NO-BREAK SPACE}{bounds[1]}]"


def signed_text(metric: Metric, difference: float, scale: float | None = None) -> str:
    """A difference with its sign, in the digits of `scale`; shares in points of a hundred."""
    share = metric.unit == "%"
    size = abs(difference if scale is None else scale) * (100 if share else 1)
    value = difference * (100 if share else 1)
    digits = 1 if share else _digits(size)
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def amount_text(metric: Metric, difference: float) -> str:
    """A difference without its sign: `0.12 nat`, `12.5 points`."""
    unit = "points" if metric.unit == "%" else metric.unit
    return f"{signed_text(metric, difference)[1:]} {unit}".rstrip()


def interval_text(metric: Metric, number: Number) -> str:
    """The 95 % interval in words, or why there is none."""
    if number.low is None or number.high is None:
        return "no interval: one seed, not repeated"
    low, high = value_text(metric, number.low), value_text(metric, number.high)
    return f"95 % interval {low} to {high}"


def percent_text(ratio: float) -> str:
    """A ratio as a change: 1.063 -> `6.3 %`, 0.5 -> `50 %` (the sign is said in words)."""
    percent = abs(ratio - 1) * 100
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %"


def _ratio(value: float) -> str:
    if not isfinite(value):
        return "∞"
    if 0.1 <= value < 9.995:
        return f"{value:.2f}"
    return f"{value:.3g}" if value < 1000 else f"{value:.1e}"


def _scaled(value: float, units: tuple[tuple[float, str], ...], suffix: str = "") -> str:
    scale, unit = _unit(value, units)
    text = f"{value / scale:,.{_digits(value / scale)}f}"
    return f"{text} {unit}{suffix}".rstrip()


def _scale(metric: Metric, value: float) -> tuple[float, str]:
    if metric.unit == "s":
        return _unit(value, _SECONDS)
    if metric.unit == "B":
        return (1.0, "B") if value < WHOLE_BYTES else _unit(value, _BYTES)
    if metric.unit == "%":
        return 0.01, "%"
    if metric.unit == "FLOP":
        scale, unit = _unit(value, _FLOPS)
        return scale, f"{unit}FLOP"
    if metric.key.endswith("parameters"):
        return _unit(value, _COUNTS)
    return 1.0, ""


def _unit(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    if units is _SECONDS and 1 <= abs(value) < 7200:
        return (60.0, "min") if abs(value) >= 120 else (1.0, "s")
    return next(((s, u) for s, u in units if abs(value) >= s), units[-1])


def _digits(value: float, metric: Metric | None = None) -> int:
    """Digits after the point: three significant ones, more for quality, none for whole counts."""
    if value == 0 or not isfinite(value):
        return 0
    whole = metric is not None and metric.exact and value == int(value)
    wanted = 4 if metric is not None and metric.quality and not metric.absolute else 3
    if whole:
        return 0
    if abs(value) >= 1:
        return max(0, wanted - 1 - int(log10(abs(value))))
    return min(MOST_DIGITS, wanted - 1 - floor(log10(abs(value))))
