"""An open-loop client: requests leave when they are due, whatever became of those before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kvlab.platform.serving.load.arrivals import Conversation, Turn

PATIENCE = 600.0
"""Seconds that an answer may take."""


@dataclass(slots=True)
class Asked:
    """One request as the client saw it; times in seconds after the load began.

    Attributes:
        due, sent: when it should leave, and did. chunks: when parts of the answer came.
        prompt, tokens: asked and answered. error: what went wrong, if anything did.
    """

    due: float
    sent: float
    prompt: int
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    answer: tuple[int, ...] = ()
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds from when it was due to the first part of its answer."""
        return self.chunks[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds from one part of the answer to the next."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


class Client:
    """Args: url: of the server's root. model: its name. headers: that each request carries."""

    def __init__(self, url: str, model: str, headers: Mapping[str, str]) -> None:
        self._url, self._model, self._headers = url, model, dict(headers)

    def run(
        self, load: Sequence[Conversation], told: Callable[[Asked], None] = lambda _: None
    ) -> tuple[list[Asked], float]:
        """Send a load; return its requests, in the order in which they ended, and the seconds.

        Args: told: hears of each as it ends.
        """
        return asyncio.run(self._run(load, told))

    async def _run(
        self, load: Sequence[Conversation], told: Callable[[Asked], None]
    ) -> tuple[list[Asked], float]:
        found: list[Asked] = []
        limit = aiohttp.TCPConnector(limit=0)
        patience = aiohttp.ClientTimeout(total=PATIENCE)
        async with aiohttp.ClientSession(connector=limit, timeout=patience) as session:
            begun = time.perf_counter()

            async def hold(conversation: Conversation) -> None:
                delay = begun + conversation.start - time.perf_counter()
                await asyncio.sleep(max(0.0, delay))
                due = conversation.start
                said: tuple[int, ...] = ()
                for turn in conversation.turns:
                    asked = await self._ask(session, (*said, *turn.added), turn, due, begun)
                    found.append(asked)
                    told(asked)
                    if asked.error is not None:
                        return
                    said = (*said, *turn.added, *asked.answer)
                    due = time.perf_counter() - begun

            await asyncio.gather(*(hold(conversation) for conversation in load))
            return found, time.perf_counter() - begun

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        prompt: tuple[int, ...],
        turn: Turn,
        due: float,
        begun: float,
    ) -> Asked:
        body: dict[str, Any] = {
            "model": self._model, "prompt": prompt, "max_tokens": turn.answer, "temperature": 0,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        asked = Asked(due, time.perf_counter() - begun, len(prompt))
        answer: list[int] = []
        try:
            url = f"{self._url}/v1/completions"
            async with session.post(url, json=body, headers=self._headers) as response:
                if response.status != 200:
                    asked.error = f"{response.status}: {(await response.text())[:200]}"
                    return asked
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    said = json.loads(line[6:])
                    ids = said["choices"][0].get("token_ids") if said.get("choices") else None
                    if ids:
                        asked.chunks.append(time.perf_counter() - begun)
                        answer += ids
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            asked.error = f"{type(error).__name__}: {error}"
        asked.tokens, asked.answer = len(answer), tuple(answer)
        if asked.error is None and asked.tokens != turn.answer:
            asked.error = f"answered {asked.tokens} tokens of {turn.answer}"
        return asked
