"""`kvlab doctor` on real homes: fresh, filled, behind, damaged."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from kvlab.db.store import Store
from kvlab.platform import doctor
from kvlab.platform.home import Home


def levels(check: Callable[[Home], Iterator[doctor.Finding]], home: Home) -> dict[str, str]:
    return {finding.name: finding.level for finding in check(home)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("KVLAB_DATABASE", "RAY_ADDRESS", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Home.find(tmp_path / "home")


def test_a_fresh_home_is_fine_and_stays_absent(home: Home) -> None:
    findings = doctor.examine(home)
    assert {f.name for f in findings} >= {"python", "torch", "devices", "cores", "memory", "home"}
    assert {f.name: f.level for f in findings}["store"] == "ok"
    assert not home.root.exists()


def test_a_current_store_is_said_to_be_current(home: Home) -> None:
    home.create()
    Store.open(home.url).close()
    (finding,) = doctor.store(home)
    assert finding.level == "ok"
    assert "current" in finding.found


def test_a_store_behind_or_damaged_fails_with_its_cure(home: Home) -> None:
    home.create()
    Store.open(home.url).close()
    with sqlite3.connect(home.root / "kvlab.db") as connection:
        connection.execute("UPDATE kvlab_version SET version_num = '0000'")
    (finding,) = doctor.store(home)
    assert finding.level == "fail"
    assert "0000" in finding.found

    (home.root / "kvlab.db").write_bytes(b"not a database" * 1000)
    (finding,) = doctor.store(home)
    assert finding.level == "fail"


def test_an_mlflow_file_that_is_none_is_a_warning(home: Home) -> None:
    home.create()
    (home.root / "mlflow.db").write_bytes(b"not a database" * 1000)
    assert levels(doctor.tracking, home) == {"mlflow": "warn"}


def test_another_mlflow_is_named_without_its_password(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/mlflow")
    (finding,) = doctor.tracking(home)
    assert finding.level == "ok"
    assert "postgresql://db/mlflow" in finding.found
    assert "secret" not in finding.found


def test_a_cluster_without_a_token_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(doctor.ray, home)["ray auth"] == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert levels(doctor.ray, home)["ray auth"] == "fail"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert levels(doctor.ray, home)["ray auth"] == "ok"


def test_pins_that_differ_are_named() -> None:
    installed = version("pytest")
    pins = f"# a comment\npytest=={installed}\ntorch==0.1\nnot-installed-here==1.0\n"
    (found,) = doctor.mismatches(pins)
    assert found.startswith("torch ")
    assert found.endswith("(0.1)")


def test_the_command_prints_json_and_its_exit_code_says_fail(home: Home) -> None:
    command = [Path(sys.executable).with_name("kvlab"), "doctor", "--json"]
    environment = {"KVLAB_HOME": str(home.root), "PATH": "", "RAY_ADDRESS": "10.0.0.1:6379"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    failed = [f for f in json.loads(done.stdout) if f["level"] == "fail"]
    assert [f["name"] for f in failed] == ["ray auth"]
    assert "RAY_AUTH_MODE=token" in failed[0]["found"]


@pytest.mark.parametrize("place", ["/proc/kv", "file", "file/below"])
def test_a_home_that_cannot_be_written_fails(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    found = Home.find(place, checked=False)
    assert levels(doctor.disk, found) == {"home": "fail"}


def test_doctor_of_a_home_that_is_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = "from kvlab.platform.cli.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env={**os.environ, "KVLAB_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert {f["name"]: f["level"] for f in json.loads(ended.stdout)}["home"] == "fail"
