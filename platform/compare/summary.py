"""What a comparison says, in sentences that claim no more than its intervals."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.platform.compare.calibrations import calibrations_in_words
from kvlab.platform.compare.controllers import guesses_in_words
from kvlab.platform.compare.formats import amount_text, percent_text, signed_text
from kvlab.platform.compare.labels import grouped, listed
from kvlab.platform.compare.metrics import Metric
from kvlab.platform.compare.model import Arm, Change, Column, Comparison
from kvlab.platform.compare.study_words import studies_in_words

MOST_ARMS = 8
"""Arms that get a sentence each; the table has them all."""
NEGLIGIBLE = 1.05
"""A ratio of qualities that may be called no loss when the interval ends below it."""
DEFAULT = (
    "perplexity", "kl", "recall", "recall_after_cut", "tokens_per_second", "kv_bytes_per_token",
)  # fmt: skip


def summarise_in_words(comparison: Comparison) -> list[str]:
    """Return sentences: what was compared, each arm against the baseline, and what is worth it."""
    beside = calibrations_in_words(comparison.calibrations[:MOST_ARMS])
    beside += guesses_in_words(comparison.guesses)[:MOST_ARMS]
    beside += studies_in_words(comparison.studies[:MOST_ARMS])
    if comparison.unfound:
        beside.append(f"No result of {listed(comparison.unfound)}: see the notes.")
    if not comparison.arms:
        return beside or ["This workflow measures no model, so there is nothing to compare."]
    if not comparison.measured:
        yet = " yet" if _unfinished(comparison) else ""
        return [f"No arm has a number{yet}.", *beside]
    columns = _columns(comparison)
    sentences = [_opening(comparison)]
    for arm in _spoken_of(comparison):
        if arm.against is not None and (claims := _claims(arm, columns)):
            sentences.append(f"{arm.id} against {arm.against}: {'; '.join(claims)}.")
    sentences.extend(_worth(comparison, columns))
    sentences.extend(_front(comparison))
    return [*sentences, *beside]


def _spoken_of(comparison: Comparison) -> list[Arm]:
    """All arms, or those on the front where there are too many to read about."""
    if len(comparison.arms) <= MOST_ARMS or comparison.front is None:
        return list(comparison.arms[: MOST_ARMS + 1])
    return [arm for arm in comparison.arms if arm.id in comparison.front.members][:MOST_ARMS]


def _columns(comparison: Comparison) -> list[Column]:
    if comparison.front is not None:
        found = [comparison.column(name) for name in comparison.front.columns]
    else:
        found = [comparison.headline(name) for name in DEFAULT]
    return [column for column in found if column is not None]


def _opening(comparison: Comparison) -> str:
    counts = [len(n.seeds) for arm in comparison.arms for n in arm.numbers.values()]
    most = max(counts, default=0)
    arms = len(comparison.arms)
    text = f"{arms} {'arm' if arms == 1 else 'arms'}, {most} {'seed' if most == 1 else 'seeds'}"
    lost = sum(comparison.jobs.get(state, 0) for state in ("failed", "skipped", "cancelled"))
    open_ = _unfinished(comparison)
    if lost:
        text += f"; {lost} of {sum(comparison.jobs.values())} jobs did not succeed"
    if open_:
        text += f"; {open_} jobs are still to finish, so numbers may change"
    return f"{text}."


def _unfinished(comparison: Comparison) -> int:
    return sum(comparison.jobs.get(state, 0) for state in ("waiting", "queued", "running"))


def _claims(arm: Arm, columns: Sequence[Column]) -> list[str]:
    claims = []
    for column in columns:
        number = arm.number(column.id)
        name = _named(column)
        if number.void:
            claims.append(f"{name} void ({number.void})")
        elif number.change is not None:
            claims.append(f"{name} {_claim(column.kind, number.change)}")
        elif number.value is None:
            claims.append(f"{name} {number.missing or 'not measured'}")
    return claims


def _claim(metric: Metric, change: Change) -> str:
    if change.verdict == "equal":
        return "equal"
    if change.ratio is None:
        return _apart(metric, change)
    if change.verdict == "no interval":
        return f"×{change.ratio:.2f}, from one seed and without an interval"
    if change.verdict == "not distinguished":
        return f"not distinguished ({_signed(change.low)} to {_signed(change.high)})"
    exact = change.low is None or change.high is None or change.low == change.high
    if change.ratio >= 1.5:
        interval = "" if exact else f" ({change.low:.2f} to {change.high:.2f})"
        return f"{change.ratio:.2f} times as high{interval}"
    word = "lower" if change.ratio < 1 else "higher"
    interval = "" if exact else f" ({_signed(change.low)} to {_signed(change.high)})"
    return f"{percent_text(change.ratio)} {word}{interval}"


def _apart(metric: Metric, change: Change) -> str:
    """What may be said where arms are compared by differences."""
    assert change.difference is not None
    amount = amount_text(metric, change.difference)
    word = "lower" if change.difference < 0 else "higher"
    if change.low is None or change.high is None:
        return f"{amount} {word}, from one seed and without an interval"
    span = f"{signed_text(metric, change.low)} to {signed_text(metric, change.high)}"
    if change.verdict == "not distinguished":
        return f"not distinguished ({span})"
    return f"{amount} {word} ({span})" if change.low < change.high else f"{amount} {word}"


def _signed(ratio: float | None) -> str:
    if ratio is None:
        return "?"
    return f"{'+' if ratio >= 1 else '−'}{percent_text(ratio)}"


def _worth(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    """Arms that gain something known while no quality is known to be lost, and the reverse."""
    quality = [c for c in columns if c.kind.quality]
    others = [c for c in columns if c not in quality]
    sentences = []
    for arm in _spoken_of(comparison):
        gains = [c for c in others if _is(arm, c, "better")]
        if not gains or not quality or arm.against is None:
            continue
        losses = [c for c in others if _is(arm, c, "worse")]
        cost = arm.number(quality[0].id).change
        if cost is None or losses:
            continue
        gained = " and ".join(_named(c) for c in gains)
        if cost.verdict == "better":
            sentences.append(f"{arm.id} is better on {gained} and on {_named(quality[0])}.")
        elif cost.verdict == "not distinguished" and cost.high is not None:
            sentences.append(_undecided(arm, gained, quality[0], cost))
        elif cost.verdict == "worse":
            sentences.append(
                f"{arm.id} buys {gained} with {_loss(quality[0], cost)}: worth it only where that "
                "is acceptable."
            )
    return sentences


def _loss(column: Column, change: Change) -> str:
    less = "more" if column.kind.better == "lower" else "less"
    if change.ratio is not None:
        return f"{percent_text(change.ratio)} {less} {_named(column)}"
    return f"{amount_text(column.kind, change.difference or 0.0)} {less} {_named(column)}"


def _undecided(arm: Arm, gained: str, column: Column, change: Change) -> str:
    quality, worse = _named(column), change.high if column.kind.better == "lower" else change.low
    assert worse is not None
    if change.ratio is None:
        beyond = "higher" if column.kind.better == "lower" else "lower"
        worst = f"{quality} up to {amount_text(column.kind, worse)} {beyond}"
        return f"{arm.id} gains on {gained}; its quality is undecided: {worst} is not ruled out."
    worst = f"{quality} up to {percent_text(worse)} higher"
    if worse > NEGLIGIBLE:
        return f"{arm.id} gains on {gained}; its quality is undecided: {worst} is not ruled out."
    return f"{arm.id} gains on {gained} without a loss of quality that shows: at worst {worst}."


def _front(comparison: Comparison) -> list[str]:
    front = comparison.front
    if front is None:
        return []
    sentences = []
    if len(front.members) > 1 and not front.dominated:
        sentences.append("No arm beats another on everything: which is best depends on the trade.")
    if len(front.dominated) > MOST_ARMS:
        sentences.append(
            f"{len(front.dominated)} arms are beaten by another; not beaten: "
            f"{listed(front.members)}."
        )
    else:
        for loser, winners in front.dominated.items():
            sentences.append(f"{loser} is beaten by {listed(winners)}.")
    for reason, arms in grouped(front.excluded).items():
        verb = "takes" if len(arms) == 1 else "take"
        sentences.append(f"{listed(arms)} {verb} no part in the Pareto front ({reason}).")
    return sentences


def _is(arm: Arm, column: Column, verdict: str) -> bool:
    number = arm.number(column.id)
    return number.stands and number.change is not None and number.change.verdict == verdict


def _named(column: Column) -> str:
    metric = column.kind
    return (
        f"{metric.title} at batch {column.batch}" if column.batch and metric.timed else metric.title
    )
