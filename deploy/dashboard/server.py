"""The web server of the page. It reads files only, and loads nothing from outside this machine."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from sse_starlette.sse import EventSourceResponse

from common.config.dashboard import is_loopback
from deploy.dashboard.charts import CHARTS, described
from deploy.dashboard.run_reader import SMOOTH, RunReader
from deploy.monitoring.metrics import METRICS

_STATIC = Path(__file__).parent / "static"
_POLL_SECONDS = 1.0
_COOKIE = "opdlm_token"
_HEADERS = {
    # nothing from elsewhere, whatever a rollout's text holds
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Accel-Buffering": "no",
}
Handler = Callable[[Request], Awaitable[Response]]


def create_app(run_dir: Path, host: str, token: str | None = None) -> FastAPI:
    """The page of one run.

    Args:
        host: the address it is bound to; on a loopback address requests for any other host name are refused, so that
            no web page can reach it through a name of its own.
        token: visitors must give it, as `?token=` once (a cookie keeps it) or as `Authorization: Bearer`.
    """
    reader = RunReader(run_dir)
    app = FastAPI(title=f"opdlm {run_dir.name}", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)
    if is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1"])

    @app.middleware("http")
    async def guard(request: Request, call_next: Handler) -> Response:
        if token is not None and not _knows(request, token):
            return Response("401: a token is required: open the page as /?token=...\n", 401, media_type="text/plain")
        if token is not None and "token" in request.query_params:  # out of the address bar and the history
            response: Response = RedirectResponse(request.url.path, 303)
            response.set_cookie(_COOKIE, token, httponly=True, samesite="strict")
            return response
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/plotly.min.js")
    async def plotly() -> Response:
        path = str(files("plotly") / "package_data" / "plotly.min.js")
        return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "max-age=604800"})

    @app.get("/api/page")
    async def description() -> dict[str, Any]:
        metrics = {name: {"unit": spec.unit, "meaning": spec.meaning} for name, spec in METRICS.items()}
        return {"name": run_dir.resolve().name, "charts": described(), "metrics": metrics}

    @app.get("/api/run")
    async def run() -> dict[str, Any]:
        reader.refresh()
        return reader.snapshot()

    @app.get("/api/series")
    async def series(
        x: Literal["response_tokens", "batch", "hours"] = "response_tokens",
        begin: float = float("-inf"),
        end: float = float("inf"),
        points: Annotated[int, Query(ge=4, le=5000)] = 600,
    ) -> dict[str, Any]:
        reader.refresh()
        lines = [line for chart in CHARTS for line in chart.lines]
        wanted = [line.metric for line in lines]
        wanted += [line.metric + SMOOTH for line in lines if line.style == "smooth"]
        return {"batches": reader.batches, "series": reader.series(x, wanted, points, begin, end)}

    @app.get("/api/rollouts")
    async def rollouts() -> list[dict[str, Any]]:
        reader.refresh()
        shown = ("batch", "ordinal", "sample", "offline", "forwards")
        return [
            {name: r[name] for name in shown} | {"tokens": len(r["tokens"]) - r["tail"] + r["cut"]}
            for r in reader.rollouts
        ]

    @app.get("/api/rollouts/{batch}/{ordinal}/{sample}")
    async def rollout(batch: int, ordinal: int, sample: int) -> dict[str, Any]:
        reader.refresh()
        for r in reader.rollouts:
            if (r["batch"], r["ordinal"], r["sample"]) == (batch, ordinal, sample):
                return r
        raise HTTPException(404, f"rollout {ordinal}/{sample} of batch {batch} is no longer kept")

    @app.get("/api/stream")
    async def stream() -> EventSourceResponse:
        async def snapshots() -> AsyncIterator[dict[str, Any]]:
            while True:
                reader.refresh()
                yield {"event": "run", "data": json.dumps(reader.snapshot()), "retry": 2000}
                await asyncio.sleep(_POLL_SECONDS)

        return EventSourceResponse(snapshots())

    app.mount("/static", StaticFiles(directory=_STATIC))
    return app


def _knows(request: Request, token: str) -> bool:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    given = (request.query_params.get("token"), request.cookies.get(_COOKIE), bearer)
    return any(g is not None and secrets.compare_digest(g.encode(), token.encode()) for g in given)


class _ServerOfARun(uvicorn.Server):
    """Ignores signals: `ray job stop` sends one to every process of a job, and the page must still show the end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        pass


def serve(run_dir: Path, host: str, port: int, token: str | None = None, with_parent: bool = False) -> None:
    """Serve until a signal comes, or, `with_parent`, until the process that started this one kills it or has ended."""
    config = uvicorn.Config(
        create_app(run_dir, host, token), host=host, port=port, log_level="warning", timeout_graceful_shutdown=1
    )
    server = _ServerOfARun(config) if with_parent else uvicorn.Server(config)
    asyncio.run(_serve(server, os.getppid() if with_parent else None))


async def _serve(server: uvicorn.Server, parent: int | None) -> None:
    async def follow() -> None:
        while parent is not None and not server.should_exit:
            server.should_exit = os.getppid() != parent
            await asyncio.sleep(1.0)

    await asyncio.gather(server.serve(), follow())
