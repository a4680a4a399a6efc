"""What the jobs of a try found, by point: read from stored results, whatever workflow made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlab.db.rows import JobRow
from kvlab.db.states import JobState
from kvlab.platform.compare.metrics import gate_reason
from kvlab.platform.trying.plan import QUALITY, RECALL, SPEED
from kvlab.platform.trying.points import key_of


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a point is from the full cache on the same prompts.

    Attributes:
        kl: mean nats a position. each: of every prompt, for paired intervals.
        agreement: share of positions where both would pick the same token.
        identical: mean tokens of the greedy continuation before the first difference. of: how many
            were generated.
        positions: mean KL at each position behind the prompt.
    """

    kl: float
    each: tuple[float, ...]
    agreement: float
    identical: float
    of: int
    positions: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Recall:
    """Share of questions that were answered, of those that the full cache answers.

    single: asked at the end of the prompt. turns: asked in a turn of its own, after the cut.
    void: the full cache answers too few for either to say anything.
    """

    single: float | None
    turns: float | None
    void: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """What a benchmark measured at one batch size; times in seconds, rates per second.

    `void`: why times do not count, else empty. Bytes are of one sequence, at its end.
    """

    kv_bytes: float
    prefill: float
    decode: float | None
    decode_low: float | None
    decode_high: float | None
    void: str = ""


@dataclass(slots=True)
class Findings:
    """Results by `Point.key`.

    Attributes:
        failed: (job, key) -> what it said when it failed. problems: the same of other jobs, by
            name.
    """

    divergence: dict[str, Divergence] = field(default_factory=dict)
    recall: dict[str, Recall] = field(default_factory=dict)
    speed: dict[str, Speed] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def read(self, jobs: Iterable[JobRow]) -> None:
        """Take in every job that ended."""
        for job in jobs:
            if job.state is JobState.DONE and job.result is not None:
                self.add(job.job, job.spec, job.result)
            elif job.state is JobState.FAILED and job.message is not None:
                apply = job.spec.get("apply")
                if apply is None:
                    self.problems[job.name] = job.message
                else:
                    self.failed[job.job, key_of(apply)] = job.message

    def add(self, job: str, spec: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Take in one result, whatever an earlier attempt at it said."""
        if job not in (QUALITY, RECALL, SPEED):
            return
        key = key_of(spec["apply"])
        self.failed.pop((job, key), None)
        if job == QUALITY:
            self.divergence[key] = read_divergence(result)
        elif job == SPEED:
            self.speed[key] = read_speed(spec, result)
        else:
            self.recall[key] = read_recall(result)


def read_divergence(result: Mapping[str, Any]) -> Divergence:
    """Read an evaluation's `divergence`."""
    found = result["divergence"]
    return Divergence(
        kl=found["kl"],
        each=tuple(found["windows"]["kl"]),
        agreement=found["top1_agreement"],
        identical=found["identical_tokens"],
        of=found["prompts"]["generate"],
        positions=tuple(value or 0.0 for value in found["by_position"]["kl"]),
    )


def read_recall(result: Mapping[str, Any]) -> Recall:
    """Read an evaluation's `recall` and `multi_turn`; a mean over no cell that stands is void."""
    single, turns = result["recall"], result["multi_turn"]
    void = single["accuracy"] is None and turns["accuracy"] is None
    return Recall(single["accuracy"], turns["accuracy"], void)


def read_speed(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Speed:
    row = result["rows"][0]
    decode = row["decode_tokens_per_second"] or {}
    closed = [name for name, held in result["gates"].items() if not held]
    return Speed(
        kv_bytes=row["kv_bytes"] / row["batch"],
        prefill=row["prefill_seconds"]["median"],
        decode=decode.get("median"),
        decode_low=decode.get("low"),
        decode_high=decode.get("high"),
        void="; ".join(map(gate_reason, closed)),
    )
