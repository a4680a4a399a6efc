"""`kvlab serve`: an OpenAI-compatible server for any result, through vLLM."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kvlab import KvlabError

SCRATCH = "kvlab-serve-"
"""Begins the names of folders that are served; the process that made them follows."""


def command(
    model: Annotated[str, typer.Argument(help="A job (its cell or name), or a model's folder.")],
    apply: Annotated[
        str | None,
        typer.Option("--apply", help="Run-time choices, as in a workflow: '{h2o: {}, ...}'."),
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option("--controller", help="Of ADORE: a job that trained one, or its folder."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="KVLAB_API_KEY",
            help="Every request must carry it.",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Of the KV cache: 4GiB; default: vLLM's choice.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=2, help="Of a request; default: as trained."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, help="At once, at most; default: vLLM's.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Default: bfloat16 on a GPU, float32 without."),
    ] = None,
    workflow: Annotated[
        str | None,
        typer.Option("--workflow", help="The job's: name or number; default: the newest with it."),
    ] = None,
) -> None:
    """Serve a trained model, a checkpoint, or either under run-time choices, until Ctrl-C.

    POST /v1/completions (streaming too) on the address that is printed. Exits with 2 for bad input.
    """
    from kvlab.platform.cli.export import chosen, published
    from kvlab.platform.serving import export, forecast, server
    from kvlab.platform.serving.vllm_0_32.engine import version
    from kvlab.platform.trying.asked import memory_of
    from kvlab.platform.trying.device import choose

    choices = chosen(apply, controller, workflow)
    source = published(model, workflow)
    pool = memory_of(memory) if memory is not None else None
    version()
    config, _ = export.check(source, choices)
    if tokens is not None and tokens > config.max_positions:
        raise KvlabError(
            f"--tokens {tokens}: the model was made for {config.max_positions} positions at most"
        )
    if not (source / "tokenizer.json").is_file():
        raise KvlabError(f"{source}: holds no tokenizer.json, and a server reads and writes text")
    kind = dtype or ("bfloat16" if choose(None) == "cuda" else "float32")
    options = {
        "--dtype": kind,
        "--kv-cache-memory-bytes": pool,
        "--max-model-len": tokens,
        "--max-num-seqs": requests,
    }
    given = [str(part) for name, value in options.items() if value for part in (name, value)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as scratch:
        folder = Path(scratch) / "model"
        asked = server.Listening(
            folder,
            source.resolve().name if Path(model).is_dir() else model,
            host,
            port,
            api_key or None,
            tuple(given),
        )
        server.check(asked)
        export.write(source, choices, folder)
        with server.started(asked) as running:
            print(f"{running.url}/v1  model '{asked.name}'", flush=True)
            for line in forecast.lines(folder, running.pool(), tokens, kind):
                print(line, flush=True)
            try:
                status = running.wait()
            except KeyboardInterrupt:
                return
        raise KvlabError(f"the server ended by itself (exit {status})")


def _sweep() -> None:
    """Remove what servers left behind that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)
