"""Store addresses."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import URL

from kvlab.db.errors import StoreError
from kvlab.db.store import Store
from kvlab.db.url import parse, path_of, shown


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:secret@host:5433/lab",
        "postgres://me:secret@host:5433/lab",
        "postgresql+psycopg2://me:secret@host:5433/lab",
        "postgresql+psycopg://me:secret@host:5433/lab",
    ],
)
def test_every_form_of_postgresql_uses_psycopg_3(text: str) -> None:
    url = parse(text)
    assert url.drivername == "postgresql+psycopg"
    assert (url.password, url.port, url.database) == ("secret", 5433, "lab")
    assert shown(url) == "postgresql://me:***@host:5433/lab"


def test_a_password_among_the_options_is_hidden_too() -> None:
    url = parse("postgresql:///lab?host=/run/pg&user=me&password=secret")
    assert "secret" not in shown(url)
    assert url.query["password"] == "secret"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mysql://me:secret@host/lab", "'mysql' is not supported"),
        ("secret", "not a database URL"),
        ("", "not a database URL"),
        ("postgresql://me:secret@host:port/lab", "not a database URL"),
        ("postgresql://me:secret@host", "names no database"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///file:lab.db", "names no file"),
        ("sqlite:///lab.db?mode=memory", "takes no options"),
    ],
)
def test_what_is_no_store_address_is_refused_without_its_password(text: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        parse(text)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["a b", "100%", "a%20b", "what?", "#1", "näme"])
def test_any_folder_can_hold_a_store(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "kvlab.db"
    text = URL.create("sqlite", database=str(path)).render_as_string()
    assert path_of(parse(text)) == path
    Store.open(text).close()
    assert path.is_file()
    Store.open(text, read_only=True).close()
