"""What a try says in words: before, about its winners, and below the table."""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.platform.planning.render import seconds as in_words
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.row import Row
from kvlab.platform.trying.sheet import Group, Sheet
from kvlab.platform.trying.subject import Subject
from kvlab.platform.trying.table import bytes_text, number


def about(subject: Subject, asked: Asked, weights: int) -> str:
    """The model in a line."""
    c = subject.config
    heads = f"{c.heads} heads" if c.heads == c.kv_heads else f"{c.heads}/{c.kv_heads} heads"
    trained = "".join(f", {name}" for choice in subject.trained.values() for name in choice)
    return (
        f"{subject.name}: {c.layers} layers, {heads}, {bytes_text(weights)} of weights, "
        f"{c.max_positions} positions{trained}; on {asked.device}"
    )


def prompts(subject: Subject, asked: Asked) -> str:
    """The prompts in a line."""
    if not subject.tokenizer:
        text = f"random token ids, since there is no usable tokenizer ({subject.why})"
    elif asked.prompts is not None:
        text = f"cut from {asked.prompts}"
    else:
        text = "cut from Python's own documentation (--prompts FILE: yours)"
    return (
        f"{asked.sequences} prompts of {asked.prompt} tokens, {asked.generate} after each; {text}"
    )


def expected(seconds: float, singles: int, composed: int, detailed: int) -> str:
    """How long it will take, in a line."""
    more = f", up to {composed} compositions" if composed else ""
    return (
        f"about {in_words(max(1.0, seconds))}: {singles} single points{more}, "
        f"the best {detailed} measured in full"
    )


def verdicts(sheet: Sheet) -> Iterator[str]:
    """A sentence for each budget's best."""
    for group, best in sheet.best():
        yield _verdict(group, best)


def _verdict(group: Group, best: Row) -> str:
    assert best.divergence is not None
    text = f"{group.title}: {best.point.label} is nearest to the full cache "
    text += f"(KL {number(best.divergence.kl)}), in {100 * best.of_full:.3g} % of its bytes"
    if best.over:
        text += ", more than the budget"
    tied = [row.point.label for row in group.rows if row.mark == "tied"]
    if tied:
        shown = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
        text += f"; not distinguished from it: {shown}"
    nearer = [row for row in group.rows if row.over and _kl(row) < _kl(best)]
    if nearer and not best.over:
        first = min(nearer, key=_kl)
        text += f"; nearer, in {100 * first.of_full:.3g} %: {first.point.label}"
    return text


def _kl(row: Row) -> float:
    return float("inf") if row.divergence is None else row.divergence.kl


def footnotes(sheet: Sheet) -> Iterator[str]:
    """What a reader must know before believing a number."""
    asked = sheet.asked
    yield (
        "★ nearest to the full cache within its budget, or at most a tenth above it; ≈ not "
        "distinguished from it (95 % interval of paired differences over "
        f"{asked.sequences} prompts). KL in nats a position."
    )
    yield (
        f"sequences: of {asked.length} tokens that {bytes_text(sheet.memory)} hold beside "
        f"{bytes_text(sheet.weights)} of weights, predicted from KV bytes alone "
        "(--memory: another device)."
    )
    if any(row.predicted for row in sheet.rows):
        yield "~ predicted by the cost model; all other bytes are those of the live cache."
    void = sorted(
        {row.speed.void for row in sheet.rows if row.speed is not None and row.speed.void}
    )
    if void:
        yield f"* a speed that does not count: {'; '.join(void)}."
    if asked.pairs == 0 and sheet.subject.tokenizer:
        yield f"recall is not measured: prompts of {asked.prompt} tokens hold too few facts."
    elif any(row.recall is not None and row.recall.void for row in sheet.rows):
        yield "recall is void: the full cache itself answers fewer than 95 % of the questions."
    if any(row.over for row in sheet.rows):
        yield (
            "↑ holds more than its budget, which is a share of the prompt: what is generated stays "
            "beside it. Such points come after those within the budget."
        )
    for group in sheet.groups:
        for row in group.rows:
            why = (row.failed or row.lacking).strip().split("\n")[0]
            if why:
                what = "failed" if row.failed else "not all measured"
                yield f"{what}: {row.point.label}, {group.title}: {why}"
    for line in sheet.left_out:
        yield f"left out: {line}"
