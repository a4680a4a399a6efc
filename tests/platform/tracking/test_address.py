"""Addresses of MLflow stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlab.platform.home import Home
from kvlab.platform.tracking.address import artifacts_of, file_of, shown


@pytest.mark.parametrize("name", ["plain", "a b", "50%", "a%20b", "what?", "#1", "näme", "a+b"])
def test_a_home_of_any_name_has_its_store_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = Home.find(tmp_path / name).tracking_uri
    assert file_of(uri) == tmp_path / name / "mlflow.db"
    artifacts = artifacts_of(uri)
    assert artifacts is not None
    assert artifacts.startswith("file:///")


def test_a_server_decides_for_itself() -> None:
    assert file_of("http://host:5000") is None
    assert artifacts_of("postgresql://host/mlflow") is None


def test_passwords_are_not_shown() -> None:
    text = "failed: postgresql://me:secret@host/db, then http://a:b@c/d"
    assert shown(text) == "failed: postgresql://…@host/db, then http://…@c/d"
