"""Run the benches, each in a process of its own, and print one table.

python -m kvlab.platform.bench [--gpu] [--only NAME,...] [--minutes N] [--json FILE] [--page FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from kvlab import KvlabError
from kvlab.platform.bench import page
from kvlab.platform.bench.line import Line
from kvlab.platform.bench.table import render

BENCHES = (
    "startup",
    "dispatch",
    "metrics",
    "jobs",
    "training",
    "kv_bytes",
    "decode",
    "sharing",
    "eviction",
    "adore",
    "squeeze",
    "serving",
    "search",
    "surface",
    "kvpress",
)
"""Modules beside this one; each has `run() -> list[Line]`."""
ON_GPU = {
    "kernels.decode": 80,
    "kernels.stored": 60,
    "papers.blocks": 60,
    "papers.squeeze": 90,
    "kernels.prefill": 45,
    "kernels.eviction": 25,
    "kernels.blocks": 20,
    "kernels.cosine": 15,
    "papers.sharing": 70,
    "papers.adore": 60,
    "kernels.query": 15,
    "kernels.controller": 15,
    "kernels.select": 15,
    "squeeze": 60,
    "eviction": 60,
    "adore": 60,
    "decode": 60,
    "sharing": 60,
    "training": 60,
    "kv_bytes": 60,
}
"""Those whose `run` takes a device and a dtype, the most telling first; seconds that each has."""
MINUTES = 9.5
"""That all of them have together."""
GRACE = 20
"""Seconds in which what was begun in time may end."""
LATE = 3
"""A bench's exit code when its time was up."""


class Found(NamedTuple):
    """What a bench measured; why there may be more, "" if there is not; whether it failed."""

    lines: list[Line]
    cut: str = ""
    failed: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; return 1 when a bench failed or a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m kvlab.platform.bench", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the GPU, in bfloat16")
    parser.add_argument("--only", help="names, separated by commas; 'kernels' for all kernels.*")
    parser.add_argument(
        "--minutes", type=float, help=f"for everything; {MINUTES:g} with --gpu, unless --only"
    )
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--page", type=Path, help="write a page about kernels and papers here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    names, unknown = wanted(chosen.only, gpu=chosen.gpu)
    if unknown:
        known = dict.fromkeys((*(() if chosen.gpu else BENCHES), *ON_GPU))
        parser.error(f"unknown bench {', '.join(unknown)}: known: {', '.join(known)}")
    if chosen.gpu and not has_gpu():
        print("bench-gpu needs a CUDA device and torch's CUDA build: none here, nothing measured")
        return 0
    if chosen.here:
        return here(names[0], chosen.gpu, chosen.json, chosen.seconds)
    minutes = chosen.minutes or (MINUTES if chosen.gpu and not chosen.only else None)
    end = None if minutes is None else perf_counter() + 60 * minutes
    lines: list[Line] = []
    failed: list[str] = []
    left: list[str] = []
    for name in names:
        start = perf_counter()
        rest = None if end is None else end - start
        if rest is not None and rest < GRACE:
            left.append(f"{name}: no time was left")
            continue
        found = apart(name, chosen.gpu, None if rest is None else min(rest, ON_GPU.get(name, rest)))
        lines += found.lines
        if found.failed:
            failed.append(name)
        if found.cut:
            left.append(f"{name}: {found.cut} after {len(found.lines)} lines")
        print(f"{name}: {perf_counter() - start:.0f} s", file=sys.stderr)
    print(render(lines))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report(lines, failed, gpu=chosen.gpu), indent=2) + "\n")
    if chosen.page is not None:
        page.write(chosen.page, lines, left)
    for what in left:
        print(f"not all measured: {what}", file=sys.stderr)
    for name in failed:
        print(f"{name} failed: its error is above", file=sys.stderr)
    return 1 if failed or any(line.met is False for line in lines) else 0


def wanted(only: str | None, *, gpu: bool) -> tuple[list[str], list[str]]:
    """The benches that `--only` names, and the names that are none's."""
    known = list(dict.fromkeys((*(() if gpu else BENCHES), *ON_GPU)))
    if only is None:
        return (list(ON_GPU) if gpu else list(BENCHES)), []
    names: list[str] = []
    unknown = []
    for name in only.split(","):
        found = [bench for bench in known if bench == name or bench.startswith(f"{name}.")]
        names += found
        if not found:
            unknown.append(name)
    return list(dict.fromkeys(names)), unknown


def here(name: str, gpu: bool, file: Path, seconds: float | None) -> int:
    """Run one bench in this process, and write its lines as they come.

    Args:
        seconds: after which nothing more is begun; None: no limit.
    """
    end = None if seconds is None else perf_counter() + seconds
    lines: list[Line] = []
    late = False
    try:
        for line in measure(name, gpu):
            lines.append(line)
            written = json.dumps({"lines": [asdict(each) for each in lines]})
            file.with_suffix(".new").write_text(written)
            file.with_suffix(".new").replace(file)
            late = end is not None and perf_counter() > end
            if late:
                break
    except KvlabError as error:
        print(error, file=sys.stderr)
        return 1
    return LATE if late else 0


def measure(name: str, gpu: bool) -> Iterable[Line]:
    """Run one bench in this process."""
    module = importlib.import_module(f"kvlab.platform.bench.{name}")
    found: Iterable[Line]
    if gpu:
        import torch

        found = module.run("cuda:0", torch.bfloat16)
    else:
        found = module.run()
    return found


def apart(name: str, gpu: bool, seconds: float | None = None) -> Found:
    """Run one bench in a process of its own; what it measured before it failed counts.

    Args:
        seconds: after which it is to begin nothing more; a while later it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.json"
        command = [sys.executable, "-m", "kvlab.platform.bench", "--here", "--only", name]
        command += ["--json", str(file), *(["--gpu"] if gpu else [])]
        command += [] if seconds is None else ["--seconds", f"{seconds:.1f}"]
        limit = None if seconds is None else seconds + GRACE
        try:
            # What libraries print goes to descriptor 2, stderr: stdout is the table alone.
            code = subprocess.run(command, stdout=2, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = LATE
        lines = json.loads(file.read_text())["lines"] if file.exists() else []
    failed = code not in (0, LATE) or not (lines or code)
    cut = "its time was up" if code == LATE else "it failed" if failed else ""
    return Found([Line(**line) for line in lines], cut, failed)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def report(lines: list[Line], failed: list[str], *, gpu: bool) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    import torch

    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if gpu else "cpu",
        },
        "lines": [{**asdict(line), "ratio": line.ratio, "met": line.met} for line in lines],
        "failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main())
