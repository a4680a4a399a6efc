"""`kvlab db`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvlab.db.versions import HEAD
from kvlab.platform.cli.db import app
from kvlab.platform.cli.main import main


def say(*arguments: str) -> str:
    found = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    return tmp_path / "home"


def test_upgrade_makes_the_store_in_kvlab_home_once(home: Path) -> None:
    assert say("current") == f"no store; this kvlab needs version {HEAD}\n"
    assert not home.exists()
    assert say("upgrade") == f"no tables -> version {HEAD}\n"
    assert say("upgrade") == f"already at version {HEAD}\n"
    assert say("current") == f"version {HEAD}, as this kvlab needs\n"
    assert json.loads(say("current", "--json")) == {"version": HEAD, "needed": HEAD}
    assert (home / "kvlab.db").is_file()


@pytest.mark.parametrize("name", ["a b", "50%", "a%20b", "what?", "#1", "näme", "a+b"])
def test_kvlab_home_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path / name))
    say("upgrade")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.db")] == [
        Path(name) / "kvlab.db"
    ]


@pytest.mark.postgres
def test_upgrade_prepares_a_postgresql_named_by_the_environment(
    postgres_url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLAB_DATABASE", postgres_url)
    assert say("upgrade") == f"no tables -> version {HEAD}\n"
    assert say("current") == f"version {HEAD}, as this kvlab needs\n"
    assert not home.exists()


def test_the_address_is_shown_without_its_password(home: Path) -> None:
    assert say("url") == f"sqlite:///{home}/kvlab.db\n"
    shown = say("url", "--url", "postgresql+psycopg://me:secret@host/lab")
    assert shown == "postgresql://me:***@host/lab\n"


def test_a_mistake_is_one_line_and_exit_code_2(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kvlab", "db", "upgrade", "--url", "oracle://me:secret@h/x"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "'oracle' is not supported" in errors
    assert "secret" not in errors
