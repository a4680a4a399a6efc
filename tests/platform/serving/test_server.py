"""`kvlab serve` as a user meets it: the real server in its own processes, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvlab import KvlabError
from kvlab.platform.cli.main import load
from kvlab.platform.serving import export
from kvlab.platform.serving.demand import Unserved
from kvlab.platform.serving.server import Listening, Server, check, started

pytest.importorskip("vllm", reason="vLLM is not installed")

WORDS = {f"w{number}": number for number in range(257)}


@pytest.fixture(scope="module")
def spoken(served: Callable[..., Path]) -> Path:
    """A model with a tokenizer."""
    folder = served({}, tie_embeddings=True)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def server(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    apply = {"eviction": {"h2o": {"recent": 0.5, "positions": "absolute", "generated": "evict"}}}
    export.write(spoken, apply, folder / "model")
    asked = Listening(
        folder / "model", "small", key="secret",
        options=("--kv-cache-memory-bytes", str(8 << 20), "--dtype", "float32"),
    )  # fmt: skip
    with started(asked, folder / "log") as running:
        yield running


def posted(server: Server, body: dict[str, Any], key: str | None = "secret") -> tuple[int, str]:
    from http.client import HTTPConnection

    line = HTTPConnection(server.host, server.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    line.request("POST", "/v1/completions", json.dumps({"model": "small", **body}), headers)
    answer = line.getresponse()
    return answer.status, answer.read().decode()


def test_it_completes_and_streams(server: Server) -> None:
    body = {"prompt": "w5 w6 w7", "max_tokens": 6, "temperature": 0}
    status, text = posted(server, body)
    assert status == 200
    whole = json.loads(text)["choices"][0]["text"]
    status, text = posted(server, {**body, "stream": True})
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert len(parts) > 3
    assert "".join(parts) == whole


def test_it_asks_for_its_key(server: Server) -> None:
    assert posted(server, {"prompt": "w5", "max_tokens": 1}, key=None)[0] == 401
    stranger = Server(server._process, server.host, server.port, None)
    for path in ("/metrics", "/v1/models", "/invocations"):
        with pytest.raises(OSError, match="401"):
            stranger.get(path)
    assert stranger.get("/health") == ""


def test_it_says_what_its_pool_is(server: Server) -> None:
    pool = server.pool()
    assert pool["block_size"] == 16
    assert pool["blocks"] * 16 * (2 * 2 * 32 * 4 + 16) == pytest.approx(8 << 20, rel=0.02)


def test_it_says_no_to_what_is_too_long(server: Server) -> None:
    status, text = posted(server, {"prompt": [1] * 600, "max_tokens": 1})
    assert status == 400
    assert "512" in text


def test_strangers_need_a_key(tmp_path: Path) -> None:
    with pytest.raises(KvlabError, match=r"--host 0\.0\.0\.0: is reached from other machines"):
        check(Listening(tmp_path, "x", host="0.0.0.0"))
    check(Listening(tmp_path, "x", host="0.0.0.0", key="k"))
    with pytest.raises(KvlabError, match="is reached from other machines"):
        check(Listening(tmp_path, "x", host="::", key=""))
    check(Listening(tmp_path, "x"))


def test_a_port_that_is_taken(server: Server, tmp_path: Path) -> None:
    """Or its owner would answer for the new server."""
    asked_ = Listening(tmp_path, "x", port=server.port)
    with pytest.raises(KvlabError, match=rf"--port {server.port}: cannot listen"), started(asked_):
        pass


def test_a_server_that_cannot_start_says_why(spoken: Path, tmp_path: Path) -> None:
    export.write(spoken, {}, tmp_path / "model")
    asked = Listening(tmp_path / "model", "x", options=("--max-model-len", "99999"))
    with (
        pytest.raises(KvlabError, match="max_model_len"),
        started(asked, tmp_path / "log"),
    ):
        pass


def test_nothing_outlives_a_killed_command(spoken: Path, tmp_path: Path) -> None:
    """Killed at its worst, it leaves no server behind."""
    code = "from kvlab.platform.cli.main import main; main()"
    arguments = ["serve", str(spoken), "--port", "0", "--memory", "8MiB"]
    command = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    line = next(line for line in command.stdout if line.startswith("http"))
    port = int(line.split("/v1")[0].rpartition(":")[2])
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    left = Server(command, "127.0.0.1", port, None)  # type: ignore[arg-type]
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            left.get("/health")
        except OSError:
            return
        time.sleep(0.2)
    pytest.fail("the server still answers")


def asked(*arguments: str) -> None:
    load("serve").main(list(arguments), standalone_mode=False)


class TestRefused:
    def test_before_anything_starts(self, spoken: Path, served: Callable[..., Path]) -> None:
        with pytest.raises(KvlabError, match="readmit: what was released cannot come back"):
            asked(str(spoken), "--apply", "{adore: {scores: rule, readmit: true}}")
        with pytest.raises(KvlabError, match=r"needs a trained controller: name one \(--contr"):
            asked(str(spoken), "--apply", "{adore: {}}")
        with pytest.raises(KvlabError, match="--controller: 'h2o' needs none"):
            asked(str(spoken), "--apply", "{h2o: {}}", "--controller", str(spoken))
        with pytest.raises(KvlabError, match="int8' cannot be served"):
            asked(str(spoken), "--apply", "{int8: {}}")
        with pytest.raises(KvlabError, match="--tokens 9999: the model was made for 512"):
            asked(str(spoken), "--tokens", "9999")
        with pytest.raises(KvlabError, match=r"holds no tokenizer\.json"):
            asked(str(served({"cla": {}})))
        with pytest.raises(KvlabError, match="is reached from other machines"):
            asked(str(spoken), "--host", "0.0.0.0")
        with pytest.raises(KvlabError, match="--apply: "):
            asked(str(spoken), "--apply", "{h2o: {recent: 7}}")

    def test_what_shares_upwards_is_not_ranked(self, served: Callable[..., Path]) -> None:
        apply = {"eviction": {"h2o": {}}}
        with pytest.raises(Unserved, match="where layers share keys downwards alone"):
            export.check(served({"lckv": {}}), apply)

    def test_pages_go_by_one_window(self, served: Callable[..., Path]) -> None:
        source = served({"cla": {}}, windows=(16, None, 16, None))
        with pytest.raises(Unserved, match="layers 0 and 1 share keys and have windows of 16"):
            export.check(source, {})

    def test_rows_that_cannot_be_foretold(self, served: Callable[..., Path]) -> None:
        apply = {"eviction": {"h2o": {}}, "budget": {"squeeze_attention": {"rounding": "truncate"}}}
        with pytest.raises(Unserved, match="rounding: truncate"):
            export.check(served({}), apply)
