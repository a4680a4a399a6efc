"""docs/results/kernels.md: what `make bench-gpu` found, or how to have it measured."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvlab.platform.bench.line import Line
from kvlab.platform.bench.table import number, render

COMMAND = "make bench-gpu"
TITLE = "# `make bench-gpu`: kernels and papers on a GPU"
METHOD = """\
A kernel is first held to its torch twin in float32 over the same numbers, new memory filled with
NaN; where it fails the row is void and has no time. Times are medians of replayed CUDA graphs, the
L2 cache overwritten before every call; what cannot be captured is timed with events and marked *.
GB/s are the bytes that the call has to move at least, beside the rate of a 1 GiB copy (bytes read
and written) of the same run. Targets: 85 % of that copy for decode attention at batch 32 and above
where the traffic is more than the L2 cache, and never slower than the twin beyond the interval.

A model's throughput is generated tokens over prefill and generation, at the largest batch that
fits, with random weights. The prefill is timed once. A step is timed in the middle of the
generation, since what it takes grows in a straight line: eight of them in one CUDA graph, both
sides without where one cannot be captured. A full cache gets there by random rows, one that evicts
by turns of text."""
EXPECTED = """\
Not measured yet: no GPU was at hand.

```sh
make bench-gpu
```

On a machine with an NVIDIA GPU (compute capability 8.0 or above) that measures for ten minutes and
writes this page anew: the date, the commit, the device, the versions, and

- for every kernel a table over batch and rows: microseconds of ours, of its torch twin and of
  torch's attention (FlashAttention and cuDNN by name), GB/s or TFLOP/s, and the share of a measured
  copy or matrix product: decode attention over a dense cache, with the key mass, after eviction,
  over int8, fp8, KIVI's 4 and 2 bits, rows of a pool and unrotated keys; prefill with the key mass;
  evict and write; the token decoder's step; the residual's cosine; the queries of a layer; ADORE's
  controller and what it chooses;
- for every paper our tokens/s beside full attention's and the paper's own ratio: the Block
  Transformer, SqueezeAttention, ADORE, layers that share keys and values;
- the other measurements of `make bench` that a GPU can make.

Where there is little but torch and Triton, `PYTHONPATH=src python -m kvlab.platform.bench --gpu
--only kernels,papers --page docs/results/kernels.md` does the same for the first two."""


def unmeasured() -> str:
    """The page before there is anything to tell."""
    return f"{TITLE}\n\n{EXPECTED}\n\n## How\n\n{METHOD}\n"


def write(path: Path, lines: Sequence[Line], left: Sequence[str], command: str = COMMAND) -> None:
    """Write the page.

    Args:
        left: what failed or was cut off by its time limit, in words.
        command: what was run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(lines, left, about(), command))


def page(lines: Sequence[Line], left: Sequence[str], on: str, command: str = COMMAND) -> str:
    """The page's text.

    Args:
        on: date, commit, device and versions.
    """
    kernels = [line for line in lines if "point" in (line.detail or {})]
    papers = [line for line in lines if "paper" in (line.detail or {})]
    rest = [line for line in lines if line not in kernels and line not in papers]
    parts = [TITLE, on, f"```sh\n{command}\n```", METHOD]
    if kernels:
        parts += ["## Kernels", *_kernels(kernels)]
    if papers:
        parts += ["## Papers", _papers(papers)]
    if rest:
        parts += ["## Other measurements", f"```\n{render(rest)}\n```"]
    if left:
        parts += ["## Not measured", "\n".join(f"- {what}" for what in left)]
    return "\n\n".join(parts) + "\n"


def about() -> str:
    """Date, commit, device and versions, as this process finds them."""
    import torch

    known = [datetime.now(UTC).strftime("%Y-%m-%d"), f"commit {_commit()}"]
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known.append(f"{found.name}, {found.total_memory / 2**30:.0f} GiB")
    known += [f"torch {torch.__version__}", f"Triton {_version('triton')}"]
    known.append(f"Python {platform.python_version()}")
    return ", ".join(known) + "."


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        found = [
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return found[0] + (" with changes" if found[1] else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not known"


def _kernels(lines: Sequence[Line]) -> list[str]:
    """A heading and a table for each kernel, in the order of their first lines."""
    groups: dict[str, list[tuple[Line, dict[str, Any]]]] = {}
    for line in lines:
        detail = line.detail or {}
        if line.void or "microseconds" in detail:  # the others repeat a time beside a rival's
            groups.setdefault(detail["kernel"], []).append((line, detail))
    parts = []
    for name, rows in groups.items():
        parts += [f"### {name[0].upper()}{name[1:]}", _kernel(rows)]
    return parts


def _kernel(rows: list[tuple[Line, dict[str, Any]]]) -> str:
    keys = list(rows[0][1]["point"])
    ways = list(dict.fromkeys(way for _, d in rows for way in d.get("microseconds", {})))
    unit = rows[0][0].unit
    measured = next((d for _, d in rows if "ceiling" in d), None)
    ceiling = "" if measured is None else f" of {number(measured['ceiling'])}"
    header = [*keys, *(f"{way}, µs" for way in ways), unit, f"%{ceiling}", "beside the twin"]
    header.append("target")
    table = [header]
    order = sorted(rows, key=lambda row: [_sortable(row[1]["point"][key]) for key in keys])
    for line, detail in order:
        point = [_cell(detail["point"][key]) for key in keys]
        if line.void:
            table.append([*point, *("–" for _ in ways), "–", "–", "–", f"VOID: {line.void}"])
            continue
        times, by = detail["microseconds"], detail["timed_by"]
        cells = [
            f"{number(times[way])}{'*' if by[way] == 'events' else ''}" if way in times else "–"
            for way in ways
        ]
        ratio = "–" if line.ratio is None else f"{line.ratio:.2f}x"
        share = f"{100 * detail['share_of_ceiling']:.0f}"
        table.append([*point, *cells, number(line.ours), share, ratio, _verdict(line)])
    return _markdown(table, text=len(header) - 1)


def _papers(lines: Sequence[Line]) -> str:
    table = [["what", "tokens/s", "batch", "beside", "tokens/s", "ratio", "the paper", "graphs"]]
    for line in lines:
        detail = line.detail or {}
        if line.void:
            table.append(
                [line.name, "–", "–", "–", "–", "–", detail["paper"], f"VOID: {line.void}"]
            )
            continue
        reasons = {detail[side]["not_captured"] for side in ("ours", "theirs")} - {""}
        assert line.theirs is not None
        graphs = "both" if detail["graphs"] else f"neither: {'; '.join(sorted(reasons))}"
        table.append(
            [
                line.name,
                number(line.ours),
                f"{detail['ours']['batch']:,}",
                line.beside,
                number(line.theirs),
                f"{line.ratio:.2f}x",
                detail["paper"],
                graphs,
            ]
        )
    return _markdown(table, text=0)


def _verdict(line: Line) -> str:
    wanted = []
    if line.least_ratio is not None:
        wanted.append(f">= {line.least_ratio:g}x")
    if line.limit is not None:
        wanted.append(f">= {line.limit:,.0f} {line.unit}")
    verdict = {None: "", True: ": met", False: ": MISSED"}[line.met]
    return ", ".join(wanted) + verdict


def _markdown(table: list[list[str]], *, text: int) -> str:
    """A Markdown table; the column `text` holds words, the others stand right."""
    header, *rows = ([cell.replace("|", "/") for cell in row] for row in table)
    rule = ["---" if i == text else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sortable(value: Any) -> tuple[int, str]:
    return (value, "") if isinstance(value, int) else (0, str(value))
