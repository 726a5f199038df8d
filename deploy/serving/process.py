"""The server's process: its socket, its signals and its end."""

from __future__ import annotations

import resource

import uvicorn

from deploy.errors import RunError
from deploy.serving.app import Server, create_app
from deploy.serving.http import PromptHttp

MOST_CONNECTIONS = 2048  # at the same time; a further one is answered with 503


def serve(server: Server, port: int, drain_seconds: int) -> None:
    """Serve until a signal comes; then take no new connections, and give running requests `drain_seconds` to end.

    Raises:
        RunError: the engine has failed.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    web = uvicorn.Server(
        uvicorn.Config(
            create_app(server),
            host=server.host,
            port=port,
            http=PromptHttp,
            ws="none",
            log_level="warning",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=drain_seconds,
            server_header=False,
        )
    )

    def end() -> None:
        web.should_exit = True

    server.engine.on_failure = end
    web.run()
    if server.engine.failure:
        raise RunError(f"the engine has ended: {server.engine.failure}")
