"""`kvlab validate`: every mistake of a workflow at once; writes nothing anywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from kvlab.platform.spec.problems import WorkflowError
from kvlab.platform.spec.read import check


def command(
    file: Annotated[Path, typer.Argument(help="A workflow YAML.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a workflow YAML and report every mistake at once: exit 0, or 2 with one line each."""
    try:
        graph = check(file)
    except WorkflowError as error:
        if not as_json:
            raise
        problems = [
            {"file": p.file, "line": p.line, "path": p.path, "message": p.message}
            for p in error.problems
        ]
        print(json.dumps({"valid": False, "problems": problems}))
        raise typer.Exit(error.exit_code) from None
    jobs = Counter(cell.job for cell in graph.cells)
    if as_json:
        print(json.dumps({"valid": True, "name": graph.name, "jobs": jobs}))
        return
    listed = ", ".join(f"{name} {count}" for name, count in jobs.items())
    print(f"{file}: valid: {len(graph.cells)} jobs ({listed})")
