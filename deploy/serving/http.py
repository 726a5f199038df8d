"""HTTP below the API: bodies within a limit, clients that go away, streams that nobody reads, connections that say
nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deploy.serving.errors import ApiError

BODY_SECONDS = 30.0  # for a body to arrive
HEADER_SECONDS = 20.0  # for a request's headers
WRITE_SECONDS = 30.0  # for a client to take a piece of a stream
T = TypeVar("T")


async def body_of(request: Request, most: int) -> bytes:
    """The body of a JSON request.

    Raises:
        ApiError: 415, it is no JSON; 413, it has more than `most` bytes; 408, it does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser sends it to another site only where that site allows it
        raise ApiError(415, f"Content-Type: {kind!r}; send application/json")
    length = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body has more than {most} bytes; send less", code="body_too_large")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError as late:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s; send it again") from late
    return bytes(body)


async def gone(receive: Receive) -> None:
    """Returns when the client has gone away; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None where the client goes away before, which cancels it."""
    watcher, worker = asyncio.ensure_future(gone(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watcher, worker}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.gather(watcher, worker, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events; ends when the client goes away or takes nothing for WRITE_SECONDS."""

    def __init__(self, events: AsyncGenerator[dict[str, Any]], headers: dict[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-store", **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            try:
                async for event in events:
                    await self._write(send, f"data: {json.dumps(event)}\n\n".encode())
                await self._write(send, b"data: [DONE]\n\n", more=False)
            except TimeoutError:
                return  # an unfinished response: the connection is closed

    async def _write(self, send: Send, body: bytes, more: bool = True) -> None:
        async with asyncio.timeout(WRITE_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more})


class PromptHttp(HttpToolsProtocol):
    """Closes connections on which the headers of a request do not arrive within HEADER_SECONDS."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._late.cancel()
        self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._late.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)
