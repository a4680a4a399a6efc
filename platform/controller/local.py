"""Ray on this machine alone, for as long as this process lives."""

from __future__ import annotations

import io
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast

import ray

from kvlab.platform.controller.pool import NAMESPACE
from kvlab.platform.spec import machine

OBJECT_STORE_BYTES = 100 << 20
"""Messages are small and go past it; artifacts are files."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


class _Quiet:
    """A stream without what Ray's own threads print: it says on stdout that a worker died."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def local_ray(cpus: int | None = None) -> Iterator[None]:
    """Start Ray and end it again.

    Only holders of a token may talk to it: one is made up unless the environment has one. Its files
    go to a folder with a short name, since the paths of its sockets are limited to 107 bytes.

    Args:
        cpus: how many CPUs jobs may have; None: those of the machine.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Unset, Ray turns token mode on for a cluster of its own; set now, it would be read too late.
    os.environ.pop("RAY_AUTH_MODE", None)
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="kvlab-ray-"))
    stdout, sys.stdout = sys.stdout, cast(TextIO, _Quiet(sys.stdout))
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=cpus or machine.cpus(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
        )
        yield
    finally:
        with redirect_stdout(io.StringIO()):  # it prints then what it held back
            ray.shutdown()
        sys.stdout = stdout
        shutil.rmtree(folder, ignore_errors=True)
