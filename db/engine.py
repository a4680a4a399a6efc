"""How kvlab connects: one engine per store, set up the same way for every transaction."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError

from kvlab.db.errors import StoreError
from kvlab.db.url import path_of, shown

SCHEMA = "kvlab"
"""The PostgreSQL schema of every table; MLflow and Optuna have their own."""

WAIT_SECONDS = 30
"""How long a writer waits for another one before it gives up."""

IDLE_SECONDS = 60
"""PostgreSQL ends a transaction idle for so long, so that a hung holder blocks nobody for ever."""

HEADER = b"SQLite format 3\0"
INSUFFICIENT_PRIVILEGE = "42501"
CURES = {
    "not a database": "name another file, or move this one away",
    "malformed": "the file is damaged; restore a copy, or move it away",
    "locked": "another process holds it; `kvlab status` shows live controllers",
    "lock timeout": "another process holds it; `kvlab status` shows live controllers",
    "full": "free some space, then `kvlab resume`",
    "permission denied": "grant the user CREATE on the database, or USAGE on schema kvlab",
}
"""What to do, by words of the driver's message."""


def connect(url: URL, *, read_only: bool = False) -> Engine:
    """Return an engine for a parsed address. Nothing is opened yet."""
    if url.get_backend_name() == "sqlite":
        return _sqlite(url, read_only)
    engine = create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        connect_args={"connect_timeout": 15},
    )
    event.listen(engine, "connect", _set_up, insert=True)
    return engine.execution_options(postgresql_readonly=True) if read_only else engine


def reading(engine: Engine) -> Engine:
    """The same engine for reads: one snapshot per transaction, never waiting for a writer."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(kvlab_reads=True)
    return engine.execution_options(isolation_level="REPEATABLE READ")


@contextmanager
def told(url: URL) -> Iterator[None]:
    """Turn a driver's error into a StoreError of one line that holds no password."""
    try:
        yield
    except DBAPIError as error:
        if _is_bug(error.orig):
            raise
        reason = " ".join(str(error.orig).split())
        raise StoreError(f"store {shown(url)}: {reason}{_cure(reason)}") from None


def _is_bug(error: BaseException | None) -> bool:
    if getattr(error, "sqlstate", None) == INSUFFICIENT_PRIVILEGE:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"ProgrammingError", "IntegrityError", "DataError"})


def _cure(reason: str) -> str:
    for words, cure in CURES.items():
        if words in reason:
            return f": {cure}"
    return ""


def _sqlite(url: URL, read_only: bool) -> Engine:
    path = path_of(url).absolute()
    place = f"file:{quote(str(path))}?mode={'ro' if read_only else 'rwc'}"
    try:
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
        _check_header(path, shown(url))
    except OSError as error:
        raise StoreError(f"store {shown(url)}: {error.strerror}: name a file of yours") from None

    def open_file() -> sqlite3.Connection:
        # isolation_level None: the driver begins nothing by itself, `_begin` below does.
        connection = sqlite3.connect(
            place, uri=True, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            # A killed process loses nothing it committed; a power cut may undo the newest commits.
            connection.execute("PRAGMA synchronous = NORMAL")
            if not read_only:
                _write_ahead(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=open_file, poolclass=QueuePool)
    event.listen(engine, "begin", _begin)
    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn on the write-ahead log, which a file keeps; wait for others that do the same.

    SQLite answers a second one that switches "database is locked" at once, whatever its timeout.
    """
    patience = time.monotonic() + WAIT_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.01)


def _check_header(path: Path, place: str) -> None:
    # SQLite takes any file of less than 100 bytes for an empty database and writes over it.
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(HEADER))
        if start and start != HEADER:
            raise StoreError(f"store {place}: file is not a database: {CURES['not a database']}")


def _begin(connection: Connection) -> None:
    # A writer takes the lock at once: upgrading a read lock later fails instead of waiting.
    reads = connection.get_execution_options().get("kvlab_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _set_up(connection: Any, record: Any) -> None:
    autocommit, connection.autocommit = connection.autocommit, True
    connection.execute(f"SET SESSION search_path TO {SCHEMA}")
    connection.execute(f"SET SESSION lock_timeout TO '{WAIT_SECONDS}s'")
    connection.execute(f"SET SESSION idle_in_transaction_session_timeout TO '{IDLE_SECONDS}s'")
    connection.autocommit = autocommit
