"""MLflow addresses: which file one means, where its artifacts go, how it is shown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

SQLITE = "sqlite:///"


def file_of(tracking_uri: str) -> Path | None:
    """The file of a SQLite address; None for a server or another database."""
    if not tracking_uri.startswith(SQLITE):
        return None
    return Path(unquote(tracking_uri.removeprefix(SQLITE))).absolute()


def artifacts_of(tracking_uri: str) -> str | None:
    """Where artifacts go: `mlflow-artifacts` beside a SQLite file, else as the server decides."""
    file = file_of(tracking_uri)
    return None if file is None else (file.parent / "mlflow-artifacts").as_uri()


def shown(text: str) -> str:
    """Text without the passwords of addresses in it."""
    return re.sub(r"://[^/@\s]+@", "://…@", text)
