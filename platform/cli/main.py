"""The `kvlab` command. A command's module is imported only when that command is invoked."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvlab import KvlabError, __version__

COMMANDS = {
    "validate": "Check a workflow YAML and report every mistake at once.",
    "plan": "Show the jobs of a workflow: state, resources and predicted cost.",
    "try": "Try every run-time method on a checkpoint, with no YAML and no training.",
    "run": "Run a workflow, locally or on a Ray cluster.",
    "status": "Show workflows, their jobs and attempts.",
    "logs": "Print what a job wrote.",
    "cancel": "Cancel a workflow: its running jobs are ended at once.",
    "resume": "Go on with a workflow that stopped, failed or was cancelled.",
    "compare": "Compare the finished jobs of a workflow: table, JSON or HTML.",
    "export": "Write a model as a folder that vLLM serves.",
    "serve": "Serve a model, with its method, to OpenAI clients.",
    "methods": "List the axes and values a method is made of.",
    "schema": "Print the JSON Schema of a workflow YAML.",
    "ui": "Open MLflow's user interface on the store.",
    "db": "Upgrade or inspect the store's schema.",
    "doctor": "Check this machine and its set-up.",
}
"""Every command: module `kvlab.platform.cli.<name>`, with a function `command` or a Typer `app`."""


class LazyGroup(TyperGroup):
    """A group that shows its help from `COMMANDS` and imports a command only to invoke it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, placeholder if name is None else load(name), rest


def load(name: str) -> Any:
    """Import the module of command `name` and return its click command."""
    module = importlib.import_module(f"kvlab.platform.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False)
        app.command(name, help=module.command.__doc__ or COMMANDS[name])(module.command)
    command = typer.main.get_command(app)
    command.name = name
    return command


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which way of shrinking the KV cache is worth it, for your model, on your hardware?",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"kvlab {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Typer builds a group only around a callback; the commands come from `COMMANDS`."""


def main() -> None:
    """Run the command line: a user's mistake is said on stderr, a bug keeps its traceback."""
    try:
        app(prog_name="kvlab")
    except KvlabError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
