"""The web application: OpenAI's API on the engine, and the page at /."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from actors.sampler.request import Request as SequenceRequest
from common.config.dashboard import is_loopback
from common.seeds import stream_key
from deploy.serving.asked import ChatAsk, CompletionAsk, Prompter, read
from deploy.serving.engine import Engine
from deploy.serving.errors import ApiError
from deploy.serving.folder import StudentFolder
from deploy.serving.http import EventStream, body_of, unless_gone
from deploy.serving.jobs import Job
from deploy.serving.original import Original
from deploy.serving.replies import Form, Reader, usage

Ask = ChatAsk | CompletionAsk
_STATIC = Path(__file__).parent / "static"
_SHARED = Path(__file__).parents[1] / "dashboard" / "static"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Server:
    """What the application serves, and its limits; `seconds` is how long a request may take, its wait included."""

    engine: Engine
    prompter: Prompter
    name: str
    host: str
    api_key: str | None = None
    original: Original | None = None
    folder: StudentFolder | None = None
    seconds: float = 600.0
    most_bytes: int = 4 << 20
    created: int = field(default_factory=lambda: int(time.time()))


def create_app(server: Server) -> FastAPI:
    """The application; its engine starts and ends with it.

    On a loopback address requests for any other host name are refused, so that no web page can reach it through a name
    of its own. With an API key, all of /v1 needs it as a bearer token.
    """
    engine = server.engine
    tokenizing = ThreadPoolExecutor(1, "tokenizer")  # long prompts keep nobody else waiting
    ordinals = itertools.count()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)
        tokenizing.shutdown(wait=False)

    app = FastAPI(title="opdlm serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    if is_loopback(server.host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1"])

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        engine.metrics.requests.labels(_path(request), error.status).inc()
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
        if error.status in (408, 413):
            headers["Connection"] = "close"  # what is left of the body is not read
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}; see docs/serving.md for what there is"
        return await api_error(request, ApiError(error.status_code, what))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return await api_error(request, ApiError(500, f"a fault of the server ({type(error).__name__}); see its log"))

    def guarded(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if server.api_key is not None and not secrets.compare_digest(given.encode(), server.api_key.encode()):
            raise ApiError(401, "no valid API key; send it as Authorization: Bearer KEY", code="invalid_api_key")

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_STATIC / "index.html", headers=_PAGE_HEADERS)

    @app.get("/shared/{name}")
    async def shared(name: str) -> Response:
        if name not in ("theme.js", "favicon.svg"):
            raise HTTPException(404, "Not Found")
        return FileResponse(_SHARED / name, headers=_PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=_STATIC))

    @app.get("/health")
    async def health() -> Response:
        if engine.failure:
            raise ApiError(503, f"the engine has ended ({engine.failure}); restart the server", code="engine_ended")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        guarded(request)
        return JSONResponse({"object": "list", "data": [_model(server)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        guarded(request)
        _check_model(server, name)
        return JSONResponse(_model(server))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        guarded(request)
        ask = read(await body_of(request, server.most_bytes), ChatAsk)
        return await answer(request, ask, lambda: [server.prompter.chat_ids(ask)], bool(ask.logprobs))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        guarded(request)
        ask = read(await body_of(request, server.most_bytes), CompletionAsk)
        return await answer(request, ask, lambda: server.prompter.plain_ids(ask), ask.logprobs is not None)

    @app.post("/compare")
    async def compare(request: Request) -> Response:
        """The original's answer, for the page."""
        guarded(request)
        if server.original is None:
            raise HTTPException(404, "there is no original (--compare)")
        ask = read(await body_of(request, server.most_bytes), ChatAsk)
        prompter, settings = server.prompter, server.prompter.settings(ask)
        ids = await asyncio.get_running_loop().run_in_executor(tokenizing, prompter.chat_ids, ask)
        limit = prompter.limit(ids, ask.limit, settings.block_size)
        return EventStream(server.original.pieces(ids, limit, settings.decoding.temperature), {})

    @app.post("/admin/reload")
    async def reload(request: Request) -> Response:
        """New weights from the student's folder. A JSON body is asked for, since other sites' pages cannot send one."""
        guarded(request)
        if server.api_key is None and not is_loopback(server.host):
            raise ApiError(403, "a server that others can reach reloads nothing without an API key; give it one")
        if server.folder is None:
            raise HTTPException(404, "there is no folder to read again")
        if (given := (await body_of(request, server.most_bytes)).strip()) not in (b"", b"{}"):
            raise ApiError(400, f"the body is {given[:80]!r}; a reload takes no fields, so send {{}}")
        version = await asyncio.to_thread(server.folder.reload, engine)
        return JSONResponse({"weights_version": version})

    async def answer(request: Request, ask: Ask, ids: Callable[[], list[np.ndarray]], logprobs: bool) -> Any:
        _check_model(server, ask.model)
        settings = server.prompter.settings(ask)
        prompts = await asyncio.get_running_loop().run_in_executor(tokenizing, ids)
        changed = asyncio.Event()
        jobs = []
        for number, prompt in enumerate(prompts):
            limit = server.prompter.limit(prompt, ask.limit, settings.block_size)
            for choice in range(settings.choices):
                key = stream_key(settings.seed, number, choice)
                sequence = SequenceRequest(
                    next(ordinals), 0, prompt, limit, stop=settings.stop, decoding=settings.decoding, key=key
                )
                rounds = ask.stream and ask.stream_rounds
                jobs.append(Job(sequence, settings.block_size, changed, ask.stream, rounds))
        with_usage = bool(ask.stream_options and ask.stream_options.include_usage)
        form = Form(isinstance(ask, ChatAsk), ask.model or server.name, logprobs, ask.reveal_order, with_usage)
        readers = [Reader(job, i, form, engine.tokenizer, engine.end_tokens) for i, job in enumerate(jobs)]
        engine.submit(jobs)
        if ask.stream:
            engine.metrics.requests.labels(_path(request), 200).inc()
            return EventStream(_chunks(server, jobs, readers, form, len(prompts), changed), {"X-Accel-Buffering": "no"})
        try:
            await unless_gone(request.receive, _all_ended(jobs, changed, server.seconds))
        finally:
            engine.cancel(jobs)
        if error := next((job.error for job in jobs if job.error), None):
            raise error
        if not all(job.ended for job in jobs):
            return Response(status_code=499)  # nobody is there to read it
        engine.metrics.requests.labels(_path(request), 200).inc()
        choices = [reader.choice() for reader in readers]
        return JSONResponse({**form.head(chunk=False), "choices": choices, "usage": usage(jobs, len(prompts))})

    return app


async def _all_ended(jobs: list[Job], changed: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not all(job.ended for job in jobs):
                await changed.wait()
                changed.clear()
    except TimeoutError as late:
        raise _too_late(seconds) from late


async def _chunks(
    server: Server, jobs: list[Job], readers: list[Reader], form: Form, prompts: int, changed: asyncio.Event
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a stream, as they become due; jobs are cancelled when nobody reads on."""
    head = form.head(chunk=True) | ({"usage": None} if form.include_usage else {})
    late = asyncio.get_running_loop().time() + server.seconds
    open_ones = list(readers)
    try:
        while open_ones:
            for reader in list(open_ones):
                if reader.job.error:
                    yield reader.job.error.body
                    return
                ended = reader.job.ended  # before the chunks are made: what comes meanwhile is for the next time
                for choice in reader.chunks():
                    yield {**head, "choices": [choice]}
                if ended:
                    open_ones.remove(reader)
            if open_ones:
                try:
                    async with asyncio.timeout_at(late):
                        await changed.wait()
                except TimeoutError:
                    yield _too_late(server.seconds).body
                    return
                changed.clear()
        if form.include_usage:
            yield {**head, "choices": [], "usage": usage(jobs, prompts)}
    finally:
        server.engine.cancel(jobs)


def _too_late(seconds: float) -> ApiError:
    return ApiError(504, f"not done within {seconds:g} s; ask for fewer tokens, or try again later", code="timeout")


def _check_model(server: Server, name: str | None) -> None:
    if name is not None and name != server.name:
        raise ApiError(
            404, f"model: {name!r} is not served here; use {server.name!r}", field="model", code="model_not_found"
        )


def _model(server: Server) -> dict[str, Any]:
    prompter = server.prompter
    decoding = prompter.decoding
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "opdlm",
        "max_model_len": prompter.longest,
        "block_size": prompter.block_size,
        "weights_version": server.engine.weights_version,
        "compare": server.original and server.original.name,
        "rules": prompter.rules,
        "decoding": {**decoding.unmasking.model_dump(), "temperature": decoding.temperature},
    }


def _path(request: Request) -> str:
    """The route, so that what strangers ask for makes no metrics of its own."""
    route = request.scope.get("route")
    return str(getattr(route, "path", "other"))
