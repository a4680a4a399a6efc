"""The OpenAI-compatible server: vLLM's own, as a process of ours, over a model's served folder."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from kvlab import KvlabError

LOOPBACK = "127.0.0.1"
PATIENCE = 600.0
"""Seconds that a server may take to start."""
GRACE = 20.0
"""Seconds that it may take to end."""
POLL = 0.2
_PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True, slots=True)
class Listening:
    """Attributes:
    folder: what is served. name: of the model in requests.
    host, port: where it listens; port 0: any that is free.
    key: that requests must carry; None: none is asked.
    options: further arguments of vLLM's server, as on its command line.
    """

    folder: Path
    name: str
    host: str = LOOPBACK
    port: int = 0
    key: str | None = None
    options: Sequence[str] = ()


class Server:
    """A running server.

    Attributes:
        host, port: where clients on this machine find it; url: of its root, no slash at the end.
        key: that requests must carry; None: none is asked.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], host: str, port: int, key: str | None
    ) -> None:
        self._process, self.host, self.port, self.key = process, host, port, key
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def get(self, path: str) -> str:
        """Read a page of it.

        Raises:
            OSError: it does not answer.
        """
        with contextlib.closing(HTTPConnection(self.host, self.port, timeout=10)) as line:
            line.request("GET", path, headers=self.headers())
            answer = line.getresponse()
            text = answer.read().decode()
        if answer.status != HTTPStatus.OK:
            raise OSError(f"{path}: {answer.status} {answer.reason}")
        return text

    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def wait(self) -> int:
        """Wait until it ends by itself; return its exit status."""
        return self._process.wait()

    def pool(self) -> dict[str, int]:
        """What it says of its KV cache: blocks, their size, tokens that it holds."""
        text = self.get("/metrics")
        line = next((row for row in text.splitlines() if row.startswith("vllm:cache_config")), "")
        found = dict(re.findall(r'(\w+)="([^"]*)"', line))
        wanted = {"num_gpu_blocks": "blocks", "block_size": "block_size"}
        return {
            ours: int(found[theirs])
            for theirs, ours in wanted.items()
            if found.get(theirs, "").isdigit()
        }


def check(asked: Listening) -> None:
    """Refuse to let strangers in.

    Raises:
        KvlabError: it would listen beyond this machine and ask for no key.
    """
    if not asked.key and not _local(asked.host):
        raise KvlabError(
            f"--host {asked.host}: is reached from other machines: give --api-key, or listen on "
            f"{LOOPBACK}"
        )


@contextlib.contextmanager
def started(asked: Listening, log: Path | None = None) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it with all its processes.

    Args: log: a file for what it says; None: where this process says it.

    Raises:
        KvlabError: it would let strangers in, has no port, or ended before it answered.
    """
    check(asked)
    port = _free(asked.host, asked.port)
    host = {"0.0.0.0": LOOPBACK, "": LOOPBACK, "::": "::1"}.get(asked.host, asked.host)  # noqa: S104
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("wb")) if log is not None else None
        process = subprocess.Popen(
            _command(asked, port), env=_environment(asked.key), stdout=out, stderr=out,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
        try:
            server = Server(process, host, port, asked.key)
            _await(server, process, log)
            yield server
        finally:
            _end(process)


def _command(asked: Listening, port: int) -> list[str]:
    guard = ["--middleware", "kvlab.platform.serving.guard.Guard"] if asked.key else []
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(asked.folder), "--served-model-name", asked.name,
        "--host", asked.host, "--port", str(port), *asked.options, *guard,
    ]  # fmt: skip


def _environment(key: str | None) -> dict[str, str]:
    """This process's, and the key: on a command line every user of the machine would read it."""
    found = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    found.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if key:
        found["VLLM_API_KEY"] = key
    return found


def _await(server: Server, process: subprocess.Popen[bytes], log: Path | None) -> None:
    patience = time.monotonic() + PATIENCE
    while time.monotonic() < patience:
        if process.poll() is not None:
            raise KvlabError(f"the server ended before it answered{_why(log)}")
        with contextlib.suppress(OSError, HTTPException):
            server.get("/health")
            return
        time.sleep(POLL)
    raise KvlabError(f"the server did not answer within {PATIENCE:.0f} s{_why(log)}")


def _why(log: Path | None) -> str:
    """What a log names as the first error."""
    if log is None:
        return ""
    text = log.read_text(errors="replace")
    named = re.findall(r"Value error, (.+)", text) or re.findall(
        r"^(?:.*ERROR.*\] )?[\w.]*(?:Error|Exception): (.+)$", text, re.MULTILINE
    )
    return f": {named[0].strip()}" if named else f": see {log}"


def end_with_parent() -> None:
    """In the new process: ask Linux to end it when whoever started it is gone, however it went."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free(host: str, port: int) -> int:
    """A port that nobody has: the one that is asked for, or any for 0.

    Raises:
        KvlabError: it is taken, or there is no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise KvlabError(f"--host {host} --port {port}: cannot listen there ({error})") from None


def _local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
