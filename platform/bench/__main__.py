"""Run the benches, each in a process of its own, and print one table.

python -m kvlab.platform.bench [--gpu] [--only NAME,...] [--json FILE]
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
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from kvlab import KvlabError
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
ON_GPU = ("training", "kv_bytes", "decode", "sharing", "eviction", "adore", "squeeze")
"""Those whose `run` takes a device and a dtype."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; return 1 when a bench failed or a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m kvlab.platform.bench", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the GPU, in bfloat16")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    names = tuple((chosen.only or ",".join(ON_GPU if chosen.gpu else BENCHES)).split(","))
    if unknown := set(names) - set(ON_GPU if chosen.gpu else BENCHES):
        parser.error(f"unknown bench {', '.join(sorted(unknown))}: known: {', '.join(BENCHES)}")
    if chosen.gpu and not has_gpu():
        print("bench-gpu needs a CUDA device and torch's CUDA build: none here, nothing measured")
        return 0
    if chosen.here:
        (name,) = names
        try:
            found = measure(name, chosen.gpu)
        except KvlabError as error:
            print(error, file=sys.stderr)
            return 1
        chosen.json.write_text(json.dumps([asdict(line) for line in found]))
        return 0
    lines: list[Line] = []
    failed: list[str] = []
    for name in names:
        start = perf_counter()
        found = apart(name, chosen.gpu)
        lines += found
        if not found:
            failed.append(name)
        print(f"{name}: {perf_counter() - start:.0f} s", file=sys.stderr)
    print(render(lines))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report(lines, failed, gpu=chosen.gpu), indent=2) + "\n")
    for name in failed:
        print(f"{name} failed: its error is above", file=sys.stderr)
    return 1 if failed or any(line.met is False for line in lines) else 0


def measure(name: str, gpu: bool) -> list[Line]:
    """Run one bench in this process."""
    module = importlib.import_module(f"kvlab.platform.bench.{name}")
    found: list[Line]
    if gpu:
        import torch

        found = module.run("cuda:0", torch.bfloat16)
    else:
        found = module.run()
    return found


def apart(name: str, gpu: bool) -> list[Line]:
    """Run one bench in a process of its own; return no line when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.json"
        command = [sys.executable, "-m", "kvlab.platform.bench", "--here", "--only", name]
        command += ["--json", str(file), *(["--gpu"] if gpu else [])]
        # What libraries print goes to descriptor 2, stderr: stdout is the table alone.
        if subprocess.run(command, stdout=2).returncode:
            return []
        return [Line(**line) for line in json.loads(file.read_text())]


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
