"""`kvlab export`: a model as a folder that transformers and vLLM load."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvlab import KvlabError

if TYPE_CHECKING:
    from kvlab.db.rows import JobRow


def command(
    model: Annotated[str, typer.Argument(help="A job (its cell or name), or a model's folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    apply: Annotated[
        str | None,
        typer.Option("--apply", help="Run-time choices, as in a workflow: '{h2o: {}, ...}'."),
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option("--controller", help="Of ADORE: a job that trained one, or its folder."),
    ] = None,
    workflow: Annotated[
        str | None,
        typer.Option("--workflow", help="The job's: name or number; default: the newest with it."),
    ] = None,
) -> None:
    """Write a model with its tokenizer as a folder that vLLM serves.

    A Hugging Face checkpoint where its architecture is one of theirs; with --apply, or where it is
    kvlab's own, a folder that vLLM serves wherever kvlab is installed.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise KvlabError(f"{folder}: is there and not an empty folder: name a new one")
    source = published(model, workflow)
    from kvlab.methods.decoder.huggingface.settings import CheckpointError
    from kvlab.platform.jobs.checkpoint import trained_method
    from kvlab.platform.serving import export

    choices = chosen(apply, controller, workflow)
    if not choices and "granularity" not in trained_method(source):
        with contextlib.suppress(CheckpointError):  # none of theirs can say all of it
            print(f"{folder}: {_checkpoint(source, folder)}")
            return
    export.write(source, choices, folder)
    print(f"{folder}: {export.ARCHITECTURE}")


def _checkpoint(source: Path, folder: Path) -> str:
    """Write a Hugging Face checkpoint; return its architecture's name."""
    from kvlab.methods.decoder.huggingface.writer import write_checkpoint
    from kvlab.methods.store import load
    from kvlab.platform.artifacts import whole
    from kvlab.platform.serving.export import copy_tokenizer

    found = load(source)  # before anything is written
    with whole(folder) as made:
        architecture = write_checkpoint(found, made)
        copy_tokenizer(source, made)
    return architecture


def chosen(apply: str | None, controller: str | None, workflow: str | None) -> dict[str, Any]:
    """Run-time choices of a command line, in canonical form; see `published`."""
    from kvlab.platform.cli.applied import canonical_of

    trained = published(controller, workflow, "controller") if controller is not None else None
    return canonical_of(apply or "{}", trained)


def published(job: str, workflow: str | None, what: str = "model") -> Path:
    """The folder of that name, or the one that a job of a workflow published.

    Args:
        workflow: its name or number; None: the newest that has the job, tries after all others.
        what: is in the folder: a "model", or a "controller".
    """
    if Path(job).is_dir():
        return Path(job).resolve()
    from kvlab.db.store import Store
    from kvlab.platform.cli.which import find
    from kvlab.platform.home import Home
    from kvlab.platform.trying.asked import NAME

    home = Home.find()
    try:
        newest = find(home, workflow)
    except KvlabError as error:
        raise KvlabError(f"'{job}' is no folder, and {error}") from error
    with Store.open(home.url, read_only=True) as store:
        numbers = [newest]
        if workflow is None:
            rows = sorted(store.workflows(), key=lambda row: bool(NAME.fullmatch(row.name)))
            numbers = [row.id for row in rows]
        having = (number for number in numbers if _called(job, store.load(number).jobs))
        number = next(having, numbers[0])
        jobs = store.load(number).jobs
    cells = _called(job, jobs)
    if not cells:
        known = ", ".join(dict.fromkeys(one.job for one in jobs))
        raise KvlabError(
            f"'{job}' is neither a folder nor a job of workflow {number}, which has {known}"
        )
    if len(cells) > 1:
        names = ", ".join(one.name for one in cells)
        raise KvlabError(f"'{job}' of workflow {number} has several cells, choose one: {names}")
    (cell,) = cells
    if cell.kind == "search" and cell.result is not None:
        cell = _winner(cell, cell.result, jobs)
    if cell.artifact_uri is None or not Path(cell.artifact_uri, f"{what}.json").is_file():
        raise KvlabError(f"'{job}' of workflow {number} ({cell.state}) has published no {what}")
    return Path(cell.artifact_uri)


def _winner(search: JobRow, result: dict[str, Any], jobs: Sequence[JobRow]) -> JobRow:
    """The job that made the model of a search's best trial, of its first seed."""
    made = f"{search.name}/{result['best']}/"
    named = set(search.spec["arms"][0]["parents"].values())
    makers = [one for one in jobs if one.job.startswith(made) and "method" in one.spec]
    return next(iter(makers), next((one for one in jobs if one.name in named), search))


def _called(job: str, jobs: Sequence[JobRow]) -> list[JobRow]:
    """The cell of that name, or all cells of the job of that name."""
    return [one for one in jobs if one.name == job] or [one for one in jobs if one.job == job]
