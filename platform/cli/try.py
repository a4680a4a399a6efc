"""`kvlab try`: every run-time method on a checkpoint, with no YAML and no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvlab import KvlabError
from kvlab.platform.cli.run import Cpus, Mlflow, Report

BUDGETS = "10%,20%,50%"


def command(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A Hugging Face or kvlab model folder, or a job.", show_default=False),
    ],
    budget: Annotated[
        str, typer.Option("--budget", help="Shares of the full cache that may be kept.")
    ] = BUDGETS,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Text or JSONL; default: Python's docs."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda or cpu; default: a GPU where there is one.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", min=1, help="Tokens of a prompt; default: 512.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", min=1, help="Tokens after it; default: 64.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=1, help="Prompts to score; default: 8.")
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=65536, help="Sequences that are timed at once.")
    ] = 4,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Only these values: a,b (see kvlab methods).")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Of the device that serves: 24GiB; default: this one's."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Shorter, fewer prompts, and no compositions.")
    ] = False,
    workflow: Annotated[
        str | None,
        typer.Option("--workflow", help="A job's: name or number; default: the newest with it."),
    ] = None,
    cpus: Cpus = None,
    mlflow: Mlflow = True,
    html: Report = None,
    yaml: Annotated[
        Path | None, typer.Option("--yaml", metavar="FILE", help="Also write its workflow here.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON at the end, and nothing before.")
    ] = False,
) -> None:
    """Try every run-time method on a checkpoint: how far from the full cache, how small, how fast.

    Interrupted, the same command goes on: what is finished is not run again. Exits with 0 when
    every point has its numbers, 1 when some failed, 2 for bad input, 130 when stopped.
    """
    from kvlab.db.states import WorkflowState
    from kvlab.platform.cli.console import console as make_console
    from kvlab.platform.cli.live import INTERRUPTED
    from kvlab.platform.compare import check_place
    from kvlab.platform.home import Home
    from kvlab.platform.trying.asked import budgets_of, memory_of, methods_of
    from kvlab.platform.trying.question import Question
    from kvlab.platform.trying.session import Session

    for place in (html, yaml):
        if place is not None:
            check_place(place)
    home = Home.find()
    question = Question(
        budgets=budgets_of(budget),
        methods=methods_of(methods),
        memory=memory_of(memory),
        prompts=prompts,
        device=device,
        prompt=prompt,
        generate=generate,
        sequences=sequences,
        batch=batch,
        quick=quick,
    )
    made = question.about(_folder(checkpoint, workflow), checkpoint)
    session = Session(made, home, make_console(stderr=as_json), cpus, quiet=as_json)
    answer = session.answer(mlflow)
    if as_json:
        print(session.as_json(answer, html, yaml))
    else:
        session.show(answer, html, yaml)
    if answer.state is WorkflowState.STOPPED:
        raise typer.Exit(INTERRUPTED)
    if answer.state is not WorkflowState.DONE:
        raise typer.Exit(1)


def _folder(checkpoint: str, workflow: str | None) -> Path:
    """The folder of a checkpoint, or of what a job published."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    if "/" in checkpoint or checkpoint.startswith("."):
        raise KvlabError(f"checkpoint: no folder at '{checkpoint}'")
    from kvlab.platform.cli.export import published

    return published(checkpoint, workflow)
