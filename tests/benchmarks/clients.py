"""Clients of a server: completions streamed to a process of their own, in a closed loop or at random times."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp
import numpy as np

MODEL = "benchmark"  # the served name
LOAD = 0.8  # of the open loop, as a share of the closed loop's requests per second
PERCENTILES = (50, 90, 99)

Body = dict[str, Any]
Asks = Callable[[list[Body], float | None, int], list["Times"]]  # rate of arrivals, or None: clients in a closed loop


class Times(NamedTuple):
    """Of one request, in seconds of one clock, and the tokens of its response."""

    sent: float
    first: float
    end: float
    tokens: int


def measured(asks: Asks, bodies: list[Body], count: int) -> dict[str, Any]:
    """Tokens per second of `count` clients in a closed loop; then how long requests wait that come at random times."""
    asks(bodies[: 2 * count], None, count)  # first uses
    closed = asks(bodies, None, count)
    rate = LOAD * len(bodies) / _span(closed)
    opened = asks(bodies, rate, count)
    row: dict[str, Any] = {
        "tokens_per_second": _tokens(closed) / _span(closed),
        "open_requests_per_second": rate,
        "open_tokens_per_second": _tokens(opened) / _span(opened),
        "tokens_per_response": _tokens(closed) / len(closed),
    }
    for name, waits in (
        ("first_block", [times.first - times.sent for times in opened]),
        ("latency", [times.end - times.sent for times in opened]),
    ):
        for percent in PERCENTILES:
            row[f"{name}_p{percent}_seconds"] = float(np.percentile(waits, percent))
    return row


def arrivals(count: int, rate: float) -> list[float]:
    """Seconds from the start: a Poisson process of that many requests a second."""
    times: list[float] = np.cumsum(np.random.default_rng(1).exponential(1 / rate, count)).tolist()
    return times


def asks_over_http(url: str) -> Asks:
    """Of the server whose API is at `url`."""
    context = multiprocessing.get_context("spawn")

    def ask(bodies: list[Body], rate: float | None, count: int) -> list[Times]:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_ask_all, args=(f"{url}/v1/completions", bodies, rate, count, sender))
        process.start()
        sender.close()
        times: list[Times] = receiver.recv()
        process.join()
        return times

    return ask


def _span(times: list[Times]) -> float:
    return max(t.end for t in times) - min(t.sent for t in times)


def _tokens(times: list[Times]) -> int:
    return sum(t.tokens for t in times)


def _ask_all(url: str, bodies: list[Body], rate: float | None, count: int, result: Any) -> None:
    result.send(asyncio.run(_all(url, bodies, rate, count)))


async def _all(url: str, bodies: list[Body], rate: float | None, count: int) -> list[Times]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def later(body: Body, after: float) -> Times:
            await asyncio.sleep(after)
            return await _ask(session, url, body)

        if rate is not None:
            pairs = zip(bodies, arrivals(len(bodies), rate), strict=True)
            return list(await asyncio.gather(*(later(body, after) for body, after in pairs)))
        left = iter(bodies)

        async def client() -> list[Times]:
            return [await _ask(session, url, body) for body in left]

        clients: list[Awaitable[list[Times]]] = [client() for _ in range(count)]
        return [times for one in await asyncio.gather(*clients) for times in one]


async def _ask(session: aiohttp.ClientSession, url: str, body: Body) -> Times:
    loop = asyncio.get_running_loop()
    sent, first, tokens = loop.time(), 0.0, 0
    asked = body | {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url, json=asked) as reply:
        if reply.status != 200:
            raise RuntimeError(await reply.text())
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            first = first or loop.time()
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return Times(sent, first, loop.time(), tokens)
