"""A plan as tables for people and as JSON for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from kvlab.platform.graph import Resources
from kvlab.platform.planning.history import CORE_FLOPS, GPU_FLOPS, Basis
from kvlab.platform.planning.plan import Plan, Planned

MOST_ROWS = 100
"""Points of matrices that are listed one by one; a larger plan is summed up by job."""

WIDEST = 10_000
BASES = get_args(Basis)
NAMED = 3
"""Jobs of unknown duration that are named; the rest is counted."""

_COLUMNS = ("parameters", "FLOPs", "KV B/token", "time")


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "name": plan.graph.name,
        "states": dict(Counter(planned.state for planned in plan.cells)),
        "assumed_flops_per_second": {"cpu_core": CORE_FLOPS, "gpu": GPU_FLOPS},
        "seconds": _total(_to_run(plan)),
        "jobs": [_cell(planned) for planned in plan.cells],
    }


def _cell(planned: Planned) -> dict[str, Any]:
    cell, prediction, duration = planned.cell, planned.prediction, planned.duration
    resources = cell.resources
    return {
        "name": cell.name,
        "job": cell.job,
        "kind": cell.kind,
        "axes": dict(cell.axes),
        "parents": dict(cell.parents),
        "needs": list(cell.needs),
        "identity": cell.identity,
        "state": planned.state,
        "why": planned.why,
        "resources": {
            "cpus": resources.cpus,
            "gpus": resources.gpus,
            "memory": resources.memory,
            "workers": resources.workers,
            "exclusive": resources.exclusive,
        },
        "parameters": prediction.parameters,
        "body_parameters": prediction.body_parameters,
        "flops": prediction.flops,
        "kv_bytes_per_token": prediction.kv_bytes_per_token,
        "study": planned.study and asdict(planned.study),
        "seconds": duration and duration.seconds,
        "seconds_from": duration and duration.basis,
    }


def show(plan: Plan, console: Console) -> None:
    """Print the plan: a line for every point of every matrix; for a large plan one for every job,
    or for every kind."""
    points = _grouped(plan.cells, _point)
    jobs = _grouped(plan.cells, lambda planned: planned.cell.job)
    if len(points) <= MOST_ROWS:
        _points(points, console)
    elif len(jobs) <= MOST_ROWS:
        _sums("job", jobs, console)
    else:
        _sums("kind", _grouped(plan.cells, lambda planned: planned.cell.kind), console)
    waiting = _to_run(plan)
    console.print(
        f"{len(plan.cells)} jobs: {_states(plan.cells)}. "
        f"Job time to run, one after the other: {seconds(_total(waiting)) or '0 s'}."
    )
    for line in _bases(waiting):
        console.print(escape(line), style="dim")


def _to_run(plan: Plan) -> list[Planned]:
    return [planned for planned in plan.cells if planned.state != "reusable"]


def _grouped(cells: Iterable[Planned], key: Callable[[Planned], str]) -> dict[str, list[Planned]]:
    groups: dict[str, list[Planned]] = {}
    for planned in cells:
        groups.setdefault(key(planned), []).append(planned)
    return groups


def _point(planned: Planned) -> str:
    """A cell's name without its seed: cells that differ in seeds alone share a line."""
    return _unseeded(planned.cell.name, planned.cell.axes.get("seed"))


def _unseeded(name: str, seed: Any) -> str:
    return name.replace(f",seed={seed}]", "]").replace(f"[seed={seed}]", "")


def _points(groups: Mapping[str, Sequence[Planned]], console: Console) -> None:
    table = _table("job", "kind", "builds on", "seeds", "state", "resources")
    for name, members in groups.items():
        cell = members[0].cell
        # A search is one cell for all seeds; other cells are one for each.
        arms = [arm["seed"] for arm in cell.spec.get("arms", ())]
        seeds = arms or [m.cell.axes["seed"] for m in members if "seed" in m.cell.axes]
        above = [name for role, name in cell.parents.items() if role != "data"]
        above += cell.needs
        for seed in arms or [cell.axes.get("seed")]:
            above = [_unseeded(name, seed) for name in above]
        table.add_row(
            escape(name),
            _kind(members[0]),
            escape("\n".join(dict.fromkeys(above))),
            ",".join(map(str, seeds)),
            escape(_states(members)),
            resources(cell.resources),
            *_numbers(members),
        )
    _print(table, console)


def _kind(planned: Planned) -> str:
    """A job's kind; of a study also its trials, and the jobs of one: `search, 30 x (evaluate)`."""
    kind = planned.cell.kind
    return kind if planned.study is None else f"{kind}, {planned.study}"


def _states(members: Sequence[Planned]) -> str:
    """`to run`, `2 reusable, 1 stale (tokens 100 -> 200)`: counts where states differ."""
    counts = Counter(planned.state for planned in members)
    parts = []
    for state, count in counts.items():
        whys = list(dict.fromkeys(p.why for p in members if p.state == state and p.why))
        why = f" ({whys[0]})" if len(whys) == 1 else " (various)" if whys else ""
        parts.append((state if len(counts) == 1 and len(members) < 2 else f"{count} {state}") + why)
    return ", ".join(parts)


def _sums(what: str, groups: Mapping[str, Sequence[Planned]], console: Console) -> None:
    table = _table(what, *(["kind"] if what == "job" else []), "cells", "state", "resources")
    for name, members in groups.items():
        shapes = {resources(planned.cell.resources) for planned in members}
        table.add_row(
            escape(name),
            *([_kind(members[0])] if what == "job" else []),
            str(len(members)),
            escape(_states(members)),
            shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes",
            *_numbers(members),
        )
    _print(table, console)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column in ("job", "kind", "builds on"), overflow="fold")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print(table: Table, console: Console) -> None:
    """Print a table; where it is too wide the terminal breaks its lines, and names stay whole."""
    options = console.options.update(max_width=WIDEST)
    console.width = max(console.width, Measurement.get(console, options, table).minimum)
    console.print(table)


def _numbers(members: Sequence[Planned]) -> tuple[str, ...]:
    """Parameters and KV bytes as a range, FLOPs and time as sums; a study's FLOPs as a range."""
    flops = [
        (p.study.flops or (0.0, 0.0)) if p.study else (p.prediction.flops or 0.0,) * 2
        for p in members
    ]
    least, most = (sum(ends) for ends in zip(*flops, strict=True))
    return (
        _range(v for p in members for v in _ends(p, "parameters")),
        _range((least, most)) if most else "",
        _range(v for p in members for v in _ends(p, "kv_bytes_per_token")),
        seconds(_total(members)),
    )


def _ends(planned: Planned, name: str) -> Sequence[float | None]:
    """What is predicted of a job's model, or the least and the most of a study's trials'."""
    if planned.study is not None:
        return getattr(planned.study, name) or ()
    return (getattr(planned.prediction, name),)


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = quantity(min(known)), quantity(max(known))
    return low if low == high else f"{low}..{high}"


def _total(members: Iterable[Planned]) -> float:
    return sum(p.duration.seconds for p in members if p.duration is not None)


def _bases(members: Iterable[Planned]) -> list[str]:
    """Say what the times rest on."""
    members = list(members)
    used = Counter[str | None](
        p.duration.basis if p.duration else "study" if p.study else None for p in members
    )
    meaning: dict[str | None, str] = {
        "like jobs": "finished jobs of its kind and size",
        "rate of its kind": "FLOPs at the rate of finished jobs of its kind and about its size",
        "assumed rate": f"FLOPs at an assumed {quantity(CORE_FLOPS)}FLOP/s a CPU core, "
        f"{quantity(GPU_FLOPS)}FLOP/s a GPU",
        "study": "unknown: it is that of the jobs of their trials",
        None: "unknown: no such job has finished yet, and it has no FLOPs to count",
    }
    return [
        f"time of {count if basis in BASES else _named(members, basis)}: {meaning[basis]}"
        for basis, count in used.items()
    ]


def _named(members: Iterable[Planned], study: str | None) -> str:
    """Some jobs, or studies, of unknown duration."""
    unknown = [p for p in members if p.duration is None and (p.study is None) == (study is None)]
    names = list(dict.fromkeys(p.cell.name for p in unknown))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def resources(shape: Resources) -> str:
    """Return `2 cpu 1 gpu x4, alone`."""
    text = f"{shape.cpus} cpu"
    if shape.gpus:
        text += f" {shape.gpus} gpu"
    if shape.memory:
        text += f" {quantity(shape.memory)}B"
    if shape.workers > 1:
        text += f" x{shape.workers}"
    return f"{text}, alone" if shape.exclusive else text


def quantity(value: float) -> str:
    """Return a number with three digits and a decimal prefix: 1.23 M."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Return a time as 0.43 s, 119 s, 3.2 min or 51 h; empty for none."""
    if value <= 0:
        return ""
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return (
                f"{value / size:,.1f} {unit}"
                if value < 10 * size
                else f"{value / size:,.0f} {unit}"
            )
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
