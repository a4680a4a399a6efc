"""`kvlab db`: bring the store to this kvlab's version, or say where it is and how old."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvlab.platform.home import Home

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Upgrade or inspect the store's schema."
)

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="sqlite:///FILE or postgresql://...; else $KVLAB_DATABASE, else KVLAB_HOME/kvlab.db.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def upgrade(url: Url = None) -> None:
    """Make the tables, or bring them to this kvlab's version. Stop controllers first."""
    from kvlab.db.versions import upgrade as bring_up

    before, after = bring_up(_address(url))
    if before == after:
        print(f"already at version {after}")
    else:
        print(f"{before or 'no tables'} -> version {after}")


@app.command()
def current(url: Url = None, as_json: Json = False) -> None:
    """Print the store's version and the one this kvlab needs."""
    from kvlab.db.versions import HEAD, version_of

    found = version_of(_address(url))
    if as_json:
        print(json.dumps({"version": found, "needed": HEAD}))
    elif found == HEAD:
        print(f"version {found}, as this kvlab needs")
    else:
        print(f"{f'version {found}' if found else 'no store'}; this kvlab needs version {HEAD}")


@app.command("url")
def show_url(url: Url = None) -> None:
    """Print the store's address, without its password."""
    from kvlab.db.url import parse, shown

    print(shown(parse(_address(url))))


def _address(url: str | None) -> str:
    return Home.find(url=url).url
