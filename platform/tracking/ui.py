"""MLflow's user interface on a home's store, on this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from kvlab import KvlabError
from kvlab.platform.tracking.address import artifacts_of, file_of, shown

HOST = "127.0.0.1"
READY_SECONDS = 120.0
POLL_SECONDS = 0.2


class UiError(KvlabError):
    """The user interface cannot be started."""


def serve(tracking_uri: str, port: int, say: Callable[[str], None]) -> None:
    """Run MLflow's server until it is interrupted; `say` gets its address once it answers.

    It listens on the loopback interface only: MLflow asks nobody for a password.

    Raises:
        UiError: no store yet, the port is taken, or the server does not start.
    """
    if tracking_uri.startswith(("http://", "https://")):
        raise UiError(
            f"MLflow runs as a server at {shown(tracking_uri)} already: open that in a browser"
        )
    file = file_of(tracking_uri)
    if file is not None and not file.is_file():
        raise UiError(
            f"there is no MLflow store at {file} yet: `kvlab run FILE` makes it "
            "(KVLAB_HOME says where kvlab looks)"
        )
    _check_free(port)
    server = subprocess.Popen(
        _command(tracking_uri, port),
        env={
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        # MLflow makes folders where it stands; and Ctrl-C is ours to pass on.
        cwd=file.parent if file is not None else None,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _await(server, port)
        say(f"MLflow is at http://{HOST}:{port} (Ctrl-C ends it)")
        server.communicate()
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)


def _command(tracking_uri: str, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", HOST, "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    artifacts = artifacts_of(tracking_uri)
    return [*command, "--default-artifact-root", artifacts] if artifacts else command


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UiError(
                f"port {port} cannot be used ({error.strerror}): name another with --port"
            ) from error


def _await(server: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise UiError(f"MLflow's server ended at once: {said[-1] if said else 'no reason'}")
        with socket.socket() as probe:
            probe.settimeout(POLL_SECONDS)
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(POLL_SECONDS)
    raise UiError(f"MLflow's server did not answer within {READY_SECONDS:.0f} s")


def _end(server: subprocess.Popen[str]) -> None:
    """End the server and the workers it made."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return
