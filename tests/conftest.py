"""A real PostgreSQL for every test that asks for one, and what stands for CUDA and its graphs."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """One server a session, on a socket of its own, in a folder that another user may enter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no runtime directory in a container and says so
        import pgserver

    server = pgserver.get_server(tempfile.mkdtemp(prefix="kvlab-pg-"), cleanup_mode="delete")
    # Tests kill processes, never the machine.
    server.psql("ALTER SYSTEM SET fsync = off;\nSELECT pg_reload_conf();")
    yield server
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: Any) -> str:
    """The address of an empty database that no other test sees. Mark the test `postgres`."""
    name = f"test_{next(_NUMBERS)}"
    postgres_server.psql(f"CREATE DATABASE {name};")
    return str(postgres_server.get_uri(name))


@pytest.fixture(scope="session")
def beside() -> Callable[[str], Any]:
    """A function from the path of a file in this folder to the module in it."""

    @cache
    def load(path: str) -> Any:
        spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def emulated() -> Any:
    """A function that captures a call on the CPU."""
    from kvlab.methods.conformance.graph import capture

    return capture
