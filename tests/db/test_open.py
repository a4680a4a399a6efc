"""Opening: fresh, current, behind, ahead, damaged, someone else's, read only."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from kvlab.db import versions
from kvlab.db.engine import connect
from kvlab.db.errors import NoStore, StoreError, WrongVersion
from kvlab.db.rows import NewJob
from kvlab.db.store import Store
from kvlab.db.url import parse


def test_a_fresh_sqlite_file_is_made_with_its_folders(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/home/kvlab.db"
    with Store.open(url) as store:
        assert store.workflows() == []
    assert versions.version_of(url) == versions.HEAD


def test_an_empty_file_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "kvlab.db").touch()
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as store:
        assert store.workflows() == []


def test_sqlite_runs_with_a_log_foreign_keys_and_patience(tmp_path: Path) -> None:
    engine = connect(parse(f"sqlite:///{tmp_path}/kvlab.db"))
    with engine.begin() as connection:
        pragmas = ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    engine.dispose()
    assert found == ["wal", 1, 1, 30_000]


def test_reading_where_there_is_nothing_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoStore, match="there is no store at"):
        Store.open(f"sqlite:///{tmp_path}/home/kvlab.db", read_only=True)
    (tmp_path / "kvlab.db").touch()
    with pytest.raises(NoStore):
        Store.open(f"sqlite:///{tmp_path}/kvlab.db", read_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kvlab.db"]
    assert (tmp_path / "kvlab.db").stat().st_size == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_that_is_behind_names_the_command(
    store_url: str, read_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "REVISIONS", (*versions.REVISIONS, "9999"))
    monkeypatch.setattr(versions, "HEAD", "9999")
    with pytest.raises(WrongVersion, match=r"at version 0001 .* needs 9999.*`kvlab db upgrade`"):
        Store.open(store_url, read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_that_is_ahead_is_refused_and_stays_as_it_is(
    store_url: str, read_only: bool
) -> None:
    engine = connect(parse(store_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE kvlab_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(WrongVersion, match="at version 9999, which is newer"):
        Store.open(store_url, read_only=read_only)
    with pytest.raises(WrongVersion, match="at version 9999, which is newer"):
        versions.upgrade(store_url)
    assert versions.version_of(store_url) == "9999"


@pytest.mark.postgres
@pytest.mark.parametrize("read_only", [False, True])
def test_postgresql_without_tables_is_left_to_the_upgrade(
    postgres_url: str, read_only: bool
) -> None:
    with pytest.raises(NoStore, match="run `kvlab db upgrade`"):
        Store.open(postgres_url, read_only=read_only)
    assert versions.version_of(postgres_url) is None


@pytest.mark.parametrize("content", [b"not a database at all, but long enough\n" * 100, b"x"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_no_database_is_one_line(
    tmp_path: Path, content: bytes, read_only: bool
) -> None:
    path = tmp_path / "kvlab.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="file is not a database") as caught:
        Store.open(f"sqlite:///{path}", read_only=read_only)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_torn_database_is_one_line(tmp_path: Path, new_job: Callable[..., NewJob]) -> None:
    path = tmp_path / "kvlab.db"
    with Store.open(f"sqlite:///{path}") as store:
        store.create_workflow("w", "", {}, [new_job(f"j{i}") for i in range(300)], 0.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with (
        pytest.raises(StoreError, match="malformed") as caught,
        Store.open(f"sqlite:///{path}") as store,
    ):
        store.load(1)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        Store.open(f"sqlite:///{tmp_path}")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"File exists|Not a directory"):
        Store.open(f"sqlite:///{tmp_path}/file/kvlab.db")


def test_someone_elses_sqlite_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE metrics (run TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"not kvlab's \(metrics\)"):
        Store.open(f"sqlite:///{path}")
    with pytest.raises(NoStore):
        Store.open(f"sqlite:///{path}", read_only=True)
    tables = sqlite3.connect(path).execute("SELECT name FROM sqlite_schema").fetchall()
    assert tables == [("metrics",)]
    assert len(before) == path.stat().st_size


def test_a_server_that_is_not_there_is_one_line_without_the_password() -> None:
    with pytest.raises(StoreError, match="onnection refused") as caught:
        Store.open("postgresql://me:secret@127.0.0.1:1/lab")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_reader_cannot_write(store_url: str) -> None:
    with Store.open(store_url, read_only=True) as store:
        with pytest.raises(StoreError, match=r"read-?only"):
            store.create_workflow("w", "", {}, [], 0.0)
        assert store.workflows() == []


def test_of_many_processes_that_meet_a_fresh_file_all_get_a_store(tmp_path: Path) -> None:
    script = (
        "import sys; from kvlab.db.store import Store; print('ready', flush=True); "
        "sys.stdin.readline(); Store.open(sys.argv[1]).create_workflow('w', '', {}, [], 0.0)"
    )
    url = f"sqlite:///{tmp_path}/kvlab.db"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        _, errors = racer.communicate(timeout=60)
        assert racer.returncode == 0, errors
    with Store.open(url) as store:
        assert len(store.workflows()) == 4
