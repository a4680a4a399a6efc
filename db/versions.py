"""Which version a store's tables have, and how they are brought to this kvlab's."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, column, inspect, select, table, text

from kvlab.db.engine import SCHEMA
from kvlab.db.errors import NoStore, StoreError, WrongVersion
from kvlab.db.migrations import REVISIONS, VERSION_TABLE

HEAD = REVISIONS[-1]


def current(connection: Connection) -> str | None:
    """The revision of the store, or None where it has no kvlab tables."""
    if VERSION_TABLE not in inspect(connection).get_table_names(schema=_schema(connection)):
        return None
    found = connection.execute(
        select(column("version_num")).select_from(table(VERSION_TABLE))
    ).scalar()
    return None if found is None else str(found)


def check(connection: Connection, place: str) -> None:
    """Raise unless the store is exactly of this kvlab's version.

    Raises:
        NoStore: no kvlab tables. WrongVersion: older or newer tables.
    """
    found = current(connection)
    if found is None:
        raise NoStore(f"store {place} has no kvlab tables: run `kvlab db upgrade`")
    if found == HEAD:
        return
    if found in REVISIONS:
        raise WrongVersion(
            f"store {place} is at version {found}, this kvlab needs {HEAD}: "
            "stop its controllers, then run `kvlab db upgrade`"
        )
    raise WrongVersion(
        f"store {place} is at version {found}, which this kvlab does not know (it needs {HEAD}): "
        "install the kvlab that made it, or a newer one"
    )


def create(engine: Engine, place: str) -> None:
    """Make the tables of a fresh SQLite file; of several processes that try, one does it."""
    with engine.begin() as connection:
        if current(connection) is None:
            _refuse_strangers(connection, place)
            _migrate(connection)


def upgrade(engine: Engine, place: str) -> tuple[str | None, str]:
    """Bring the store to HEAD in one transaction; return the revisions before and after."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # Two upgrades at once: the second waits, then finds nothing to do.
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('kvlab upgrade'))"))
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        before = current(connection)
        if before is None:
            _refuse_strangers(connection, place)
        elif before not in REVISIONS:
            check(connection, place)
        if before != HEAD:
            _migrate(connection)
    return before, HEAD


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(connection=connection, schema=_schema(connection))
    command.upgrade(config, "head")


def _refuse_strangers(connection: Connection, place: str) -> None:
    tables = inspect(connection).get_table_names(schema=_schema(connection))
    if tables:
        raise StoreError(
            f"store {place} holds tables that are not kvlab's ({', '.join(sorted(tables)[:3])}, "
            "...): give kvlab a file or database of its own"
        )


def _schema(connection: Connection) -> str | None:
    return SCHEMA if connection.dialect.name == "postgresql" else None
