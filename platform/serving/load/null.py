"""A server that does nothing: what a client measures of it is the client itself.

python -m kvlab.platform.serving.load.null
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from aiohttp import web

from kvlab import KvlabError
from kvlab.platform.serving.server import end_with_parent

HOST = "127.0.0.1"


async def completions(request: web.Request) -> web.StreamResponse:
    """Answer as many tokens as are asked for, each in a part of its own, at once."""
    asked = await request.json()
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    part = json.dumps({"choices": [{"index": 0, "text": "x", "token_ids": [1]}]})
    for _ in range(asked["max_tokens"]):
        await answer.write(f"data: {part}\n\n".encode())
    await answer.write(b"data: [DONE]\n\n")
    return answer


def main() -> None:
    """Listen on a free port of this machine, and print it."""
    application = web.Application()
    application.router.add_post("/v1/completions", completions)

    runner = web.AppRunner(application)

    async def serve() -> None:
        await runner.setup()
        await web.TCPSite(runner, HOST, 0).start()
        port = runner.addresses[0][1]
        print(port, flush=True)
        await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


@contextlib.contextmanager
def started() -> Iterator[str]:
    """Run it in a process of its own; give its URL."""
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
    )
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port.isdigit():
            raise KvlabError("the null server did not start")
        yield f"http://{HOST}:{port}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
