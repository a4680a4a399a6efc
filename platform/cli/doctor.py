"""`kvlab doctor`: check this machine and its set-up."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvlab.platform.doctor import examine
from kvlab.platform.home import Home

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a machine.")] = False,
) -> None:
    """Check this machine and its set-up. Exits 1 when something would stop a run."""
    findings = examine(Home.find(checked=False))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        for finding in findings:
            style = STYLES[finding.level]
            level = f"[{style}]{finding.level:<4}[/{style}]"
            console.print(f"{level}  {finding.name:<9} {escape(finding.found)}")
            if finding.advice:
                console.print(f"{'':<16} -> {escape(finding.advice)}")
    raise typer.Exit(1 if any(finding.level == "fail" for finding in findings) else 0)
