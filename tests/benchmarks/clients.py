"""Clients of a server, in a process of their own that imports no model: how long each of them waits."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import numpy as np

Times = tuple[float, float, float]  # sent, first block, end


def ask_all(url: str, bodies: list[dict[str, Any]], rate: float | None, count: int, result: Any) -> None:
    """Send the times of every request to `result`; `rate` in requests a second, or None: `count` clients in a closed
    loop."""
    result.send(asyncio.run(_all(url, bodies, rate, count)))


async def _all(url: str, bodies: list[dict[str, Any]], rate: float | None, count: int) -> list[Times]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        if rate is not None:
            gaps = np.random.default_rng(1).exponential(1 / rate, len(bodies))
            arrivals = np.cumsum(gaps).tolist()
            return list(
                await asyncio.gather(*(_ask(session, url, b, at) for b, at in zip(bodies, arrivals, strict=True)))
            )
        left = iter(bodies)

        async def client() -> list[Times]:
            return [await _ask(session, url, body, 0.0) for body in left]

        return [times for one in await asyncio.gather(*(client() for _ in range(count))) for times in one]


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], after: float) -> Times:
    await asyncio.sleep(after)
    sent, first = time.perf_counter(), 0.0
    async with session.post(url, json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {") and "error" in (event := json.loads(line[6:])):
                raise RuntimeError(event["error"]["message"])
            first = first or time.perf_counter()
    return sent, first, time.perf_counter()
