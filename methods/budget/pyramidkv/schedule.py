"""PyramidKV's schedule: the rows of every layer, an arithmetic sequence. No torch."""

from __future__ import annotations

from fractions import Fraction

from kvlab.methods.budget.pyramidkv.params import PyramidParams


def rows(params: PyramidParams, layers: int, prompt: int, window: int, least: int) -> list[int]:
    """Return the past rows that each of `layers` keeps of a prompt of so many, from the bottom.

    Args:
        layers: that own keys and values.
        prompt: rows of it, padding excluded.
        window: the newest rows that the eviction always keeps (SnapKV's window); 0 where it has
            none. All rules count it in what they return.
        least: rows below which no layer may fall. The two rules of others only know the window.
    """
    if params.rule == "paper":
        kept = _paper(params, layers, prompt, window)
    elif params.rule == "kvpress":
        kept = _kvpress(params, layers, prompt, window)
    else:
        return _conserve(params, layers, prompt, least)
    return [max(each, window or least) for each in kept]


def _conserve(params: PyramidParams, layers: int, prompt: int, least: int) -> list[int]:
    """The window inside the count, from 2 b - b / beta down to b / beta, in all `layers` b."""
    average = max(params.rows(prompt), least)
    if average >= prompt or average == least or layers == 1:
        return [average] * layers
    low = max(Fraction(average, params.beta), Fraction(least), Fraction(2 * average - prompt))
    step = 2 * (average - low) / (layers - 1)
    exact = [2 * average - low - layer * step for layer in range(layers)]
    kept = [int(each) for each in exact]
    # The largest remainders are rounded up, the bottom ones first: the sequence still never rises.
    by_remainder = sorted(range(layers), key=lambda layer: kept[layer] - exact[layer])
    for layer in by_remainder[: layers * average - sum(kept)]:
        kept[layer] += 1
    return kept


def _paper(params: PyramidParams, layers: int, prompt: int, window: int) -> list[int]:
    """The repository's: the window on top, and a floored step, so the total exceeds its budget."""
    capacity = params.rows(prompt)
    past = max(0, capacity - window)
    if prompt < 2 * past or prompt < capacity or layers == 1:
        return [capacity] * layers
    low = past // params.beta
    high = 2 * past - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * past - high
    step = (high - low) // (layers - 1)
    return [high - layer * step + window for layer in range(layers)]


def _kvpress(params: PyramidParams, layers: int, prompt: int, window: int) -> list[int]:
    """That of kvpress 0.5.5: the window inside the count; uniform where the top would lose it."""
    average = float(params.tokens) if params.tokens is not None else params.share * prompt
    low = average / params.beta
    high = 2 * average - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * average - high
    if layers == 1 or not prompt >= high >= low >= window:
        return [max(1, round(average))] * layers
    return [round(high - layer * (high - low) / (layers - 1)) for layer in range(layers)]
