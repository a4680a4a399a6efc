"""Which numbers may stand under one heading, and which heading comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.platform.compare.arms import Draft
from kvlab.platform.compare.metrics import METRICS, QUALITIES
from kvlab.platform.compare.model import Column, Setting
from kvlab.platform.compare.samples import Key, Reading

MAIN = (
    "body_parameters",
    "parameters",
    "perplexity",
    "perplexity_per_byte",
    "tokens_per_second",
    "time_to_first_token",
    "kv_bytes_per_token",
    "kv_bytes_per_token_predicted",
    "served_tokens_per_second",
    "pool_requests",
    "peak_memory_bytes",
    "train_seconds",
    "train_flops",
)
"""What the main table shows, in this order."""

SPLIT = frozenset({"divergence", "recall", "multi_turn"})
"""Parts of an evaluation beside held-out text, which keeps the job's name for itself."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The settings and columns of a comparison.

    `keys`: setting id -> what its samples carry; `jobs`: setting id -> the YAML jobs behind it.
    """

    settings: tuple[Setting, ...]
    columns: tuple[Column, ...]
    keys: Mapping[str, tuple[Any, ...]]
    jobs: Mapping[str, frozenset[str]]
    notes: tuple[str, ...]

    def key(self, column: Column) -> Key:
        setting = self.keys[column.setting] if column.setting else None
        return Key(column.metric, setting, column.batch)


def lay_out(drafts: Sequence[Draft]) -> Layout:
    """Group what was measured into settings, and pick the headline of each place.

    The headline setting is the one most arms were measured in, the first of several; the headline
    batch is the largest that all arms measured there have in common.
    """
    taken = sorted((found for draft in drafts for found in draft.readings), key=lambda f: f[0].id)
    readings: dict[tuple[Any, ...], list[tuple[str, Reading]]] = {}
    for row, reading in taken:
        readings.setdefault(reading.setting, []).append((row.job, reading))
    settings, keys = _settings(readings)
    heads = {
        place: max(
            (s for s in settings if s.place == place),
            key=lambda s: len(_arms(drafts, keys[s.id])),
            default=None,
        )
        for place in (*QUALITIES, "speed", "serving", "load")
    }
    columns: list[Column] = []
    for metric in METRICS.values():
        if metric.place == "training":
            if any(Key(metric.key, None, None) in draft.samples for draft in drafts):
                columns.append(Column(metric.key, metric.key, None, None, metric.key in MAIN))
            continue
        for setting in settings:
            if setting.place != metric.place:
                continue
            columns.extend(
                _columns(
                    metric.key, setting, keys[setting.id], drafts, setting is heads[setting.place]
                )
            )
    jobs = {name: frozenset(job for job, _ in readings[key]) for name, key in keys.items()}
    return Layout(tuple(settings), tuple(columns), keys, jobs, tuple(_notes(settings)))


def _columns(
    metric: str, setting: Setting, key: tuple[Any, ...], drafts: Sequence[Draft], head: bool
) -> list[Column]:
    batches = {
        sample.batch: None
        for draft in drafts
        for sample in draft.samples
        if sample.metric == metric and sample.setting == key
    }
    chosen = setting.details.get("headline_batch")
    found = []
    for batch in sorted(batches, key=lambda b: (b is not None, b or 0)):
        suffix = "" if batch is None else f",batch={batch}"
        headline = head and (batch is None or batch == chosen)
        found.append(Column(f"{metric}[{setting.id}{suffix}]", metric, setting.id, batch, headline))
    return found


def _settings(
    readings: Mapping[tuple[Any, ...], list[tuple[str, Reading]]],
) -> tuple[list[Setting], dict[str, tuple[Any, ...]]]:
    settings: list[Setting] = []
    keys: dict[str, tuple[Any, ...]] = {}
    for key, members in readings.items():
        job, first = members[0]
        own = job if first.place not in SPLIT else f"{job}:{first.place}"
        taken = sum(name == own or name.startswith(f"{own}/") for name in keys)
        name = f"{own}/{taken + 1}" if taken else own
        details = dict(first.details)
        if first.place in ("speed", "serving"):
            details["headline_batch"] = _common_batch([reading for _, reading in members])
        settings.append(Setting(name, first.place, _title(first), details))
        keys[name] = key
    return settings, keys


def _common_batch(readings: Sequence[Reading]) -> int | None:
    """The largest batch that every reading has; without a common one, the largest of any."""
    batches = [{key.batch for key in reading.samples if key.batch} for reading in readings]
    batches = [found for found in batches if found]
    if not batches:
        return None
    common = set.intersection(*batches)
    return max(common or set.union(*batches))


def _title(reading: Reading) -> str:
    details = reading.details
    if reading.place == "quality":
        return (
            f"{details['targets']:,} targets, from token {details['first_target']} of windows of "
            f"{details['sequence_length']}"
        )
    if reading.place == "divergence":
        return (
            f"{details['count']:,} prompts of {details['prompt']} tokens, {details['targets']:,} "
            f"targets after them, {details['generate']} tokens generated"
        )
    if reading.place in ("recall", "multi_turn"):
        asked = "at the end of the prompt" if reading.place == "recall" else "after the cut"
        void = f", {details['void_cells']} of {details['cells']} cells void"
        return f"{details['count']:,} questions {asked}{void if details['void_cells'] else ''}"
    parts = [f"prompt {details['prompt']}, generate {details['generate']}"]
    if reading.place == "serving":
        parts.append(f"through vLLM, a pool of {details['pool'] / 2**20:,.0f} MiB")
    if reading.place == "load":
        parts = [f"{details['rate']:g} requests a second, {', '.join(parts)}"]
        parts.append(f"{details['requests']} requests, {details['memory'] / 2**20:,.0f} MiB")
    if not details.get("cuda_graph", True):
        parts.append("eager steps")
    parts += [str(details[name]) for name in ("device_name", "dtype") if details.get(name)]
    if details.get("threads") and str(details.get("device") or "cpu").startswith("cpu"):
        parts.append(f"{details['threads']} threads")
    return ", ".join(parts)


def _arms(drafts: Sequence[Draft], key: tuple[Any, ...]) -> list[Draft]:
    return [
        draft for draft in drafts if any(reading.setting == key for _, reading in draft.readings)
    ]


def _notes(settings: Sequence[Setting]) -> list[str]:
    notes = []
    quality = [setting for setting in settings if setting.place == "quality"]
    if len(quality) > 1:
        names = ", ".join(setting.id for setting in quality)
        notes.append(
            f"Perplexities were measured on {len(quality)} different sets of target tokens "
            f"({names}); numbers of different sets stand in different columns and are never "
            "compared. One evaluate job scores all arms it names on common targets."
        )
    for place, what in (
        ("divergence", "Divergences"),
        ("recall", "Answers"),
        ("multi_turn", "Answers after the cut"),
    ):
        found = [setting.id for setting in settings if setting.place == place]
        if len(found) > 1:
            notes.append(
                f"{what} were measured on {len(found)} different sets of prompts "
                f"({', '.join(found)}); numbers of different sets stand in different columns and "
                "are never compared."
            )
    devices = {
        (s.details.get("device_name"), s.details.get("threads"))
        for s in settings
        if s.place == "speed"
    }
    if len(devices) > 1:
        notes.append(
            "Speeds were measured on different devices or thread counts; they stand in different "
            "columns and are never compared."
        )
    return notes
