"""Which version a store's tables have, and how they are brought to this kvlab's."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import ColumnClause, Connection, Engine, column, inspect, select, table, text

from kvlab.db.engine import SCHEMA, connect, reading, told
from kvlab.db.errors import NoStore, StoreError, WrongVersion
from kvlab.db.migrations import REVISIONS, VERSION_TABLE
from kvlab.db.url import parse, path_of, shown

HEAD = REVISIONS[-1]


def version_of(url: str) -> str | None:
    """The version of the store at `url`, None where there is none. Changes nothing."""
    parsed = parse(url)
    if parsed.get_backend_name() == "sqlite" and not path_of(parsed).exists():
        return None
    engine = connect(parsed, read_only=True)
    try:
        with told(parsed), reading(engine).begin() as connection:
            return current(connection)
    finally:
        engine.dispose()


def upgrade(url: str) -> tuple[str | None, str]:
    """Bring the store at `url` to HEAD, in one transaction.

    Returns:
        its version before (None: there was none) and after.

    Raises:
        WrongVersion: it is newer than this kvlab. StoreError: no access, or someone else's tables.
    """
    parsed = parse(url)
    place = shown(parsed)
    engine = connect(parsed)
    try:
        with told(parsed), engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                # Of two upgrades at once the second waits here, then finds nothing to do.
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('kvlab upgrade'))"))
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
            before = current(connection)
            if before is not None and before not in REVISIONS:
                check(connection, place)
            if before != HEAD:
                _migrate(connection, place)
            return before, HEAD
    finally:
        engine.dispose()


def create(engine: Engine, place: str) -> None:
    """Make the tables of a fresh SQLite file; of several processes that try, one does it."""
    with engine.begin() as connection:
        if current(connection) is None:
            _migrate(connection, place)


def current(connection: Connection) -> str | None:
    """The version of the store, or None where it has no kvlab tables."""
    if not inspect(connection).has_table(VERSION_TABLE, schema=_schema(connection)):
        return None
    number: ColumnClause[str] = column("version_num")
    return connection.execute(select(number).select_from(table(VERSION_TABLE))).scalar()


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
            f"store {place} is at version {found} and this kvlab needs {HEAD}: "
            "stop its controllers, then run `kvlab db upgrade`"
        )
    raise WrongVersion(
        f"store {place} is at version {found}, which is newer than this kvlab's {HEAD}: "
        "use the kvlab that made it, or a newer one"
    )


def _migrate(connection: Connection, place: str) -> None:
    from alembic import command
    from alembic.config import Config

    tables = inspect(connection).get_table_names(schema=_schema(connection))
    if tables and VERSION_TABLE not in tables:
        raise StoreError(
            f"store {place} holds tables that are not kvlab's ({', '.join(sorted(tables)[:3])}): "
            "give kvlab a file, or a database, of its own"
        )
    config = Config()
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(connection=connection, schema=_schema(connection))
    command.upgrade(config, "head")


def _schema(connection: Connection) -> str | None:
    return SCHEMA if connection.dialect.name == "postgresql" else None
