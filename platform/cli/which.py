"""Which stored workflow a command line means."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from kvlab import KvlabError
from kvlab.db.errors import NoStore
from kvlab.db.store import Store

if TYPE_CHECKING:
    from kvlab.platform.home import Home


def find(home: Home, written: str | None) -> int:
    """Return a workflow's number, given that, its name (the newest run) or None (the newest).

    Raises:
        KvlabError: there is none.
    """
    try:
        with Store.open(home.url, read_only=True) as store:
            rows = store.workflows()
    except NoStore:
        rows = []
    if written is None and rows:
        return rows[0].id
    for row in rows:
        if written in (str(row.id), row.name):
            return row.id
    if not rows:
        raise KvlabError(nothing(home))
    close = get_close_matches(written or "", [row.name for row in rows], n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise KvlabError(f"no workflow '{written}': {hint}`kvlab status` lists them")


def nothing(home: Home) -> str:
    """Say that there is no workflow."""
    return f"{home.root} holds no workflow yet: `kvlab run FILE` makes one"
