"""Store addresses: which are accepted, and how they are shown."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from kvlab.db.errors import StoreError

FORMS = "sqlite:///FOLDER/kvlab.db or postgresql://USER:PASSWORD@HOST/DATABASE"


def parse(text: str) -> URL:
    """Return the address with its driver filled in (psycopg 3 for PostgreSQL).

    Raises:
        StoreError: another database, an in-memory SQLite, or no address at all. The text itself
            is not repeated when it cannot be parsed, since it may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise StoreError(f"the store address is not a database URL: write {FORMS}") from None
    dialect = url.get_backend_name()
    if dialect == "postgres":
        dialect = "postgresql"
    if dialect == "sqlite":
        if url.query:
            raise StoreError(
                f"store address {shown(url)}: a file takes no options; "
                "write a '?' in its path as %3F"
            )
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise StoreError(
                f"store address {shown(url)} names no file: the store must outlive its process; "
                "write sqlite:///FOLDER/kvlab.db"
            )
        return url.set(drivername="sqlite+pysqlite")
    if dialect == "postgresql":
        if not url.database:
            raise StoreError(f"store address {shown(url)} names no database: write {FORMS}")
        return url.set(drivername="postgresql+psycopg")
    raise StoreError(f"store address {shown(url)}: '{dialect}' is not supported: write {FORMS}")


def shown(url: URL) -> str:
    """The address as it may be printed: plain scheme, password hidden, in the query too."""
    query = {key: "***" if "password" in key.lower() else value for key, value in url.query.items()}
    plain = url.set(drivername=url.get_backend_name(), query=query)
    return plain.render_as_string(hide_password=True)


def path_of(url: URL) -> Path:
    """The file of a SQLite address."""
    assert url.database is not None
    return Path(url.database)
