"""The server's process: its socket, its signals and its end."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from typing import Any

import uvicorn

from deploy.errors import RunError
from deploy.serving.app import Server, create_app
from deploy.serving.http import PromptHttp

_log = logging.getLogger(__name__)
MOST_CONNECTIONS = 2048  # at the same time; a further one is answered with 503


def serve(server: Server, port: int, drain_seconds: int) -> None:
    """Serve until a signal comes; then take no new connections, and give running requests `drain_seconds` to end.
    SIGHUP reads the student's folder again.

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

    def again(*_: Any) -> None:
        threading.Thread(target=_reload, args=(server,), name="reload", daemon=True).start()

    server.engine.on_failure = end
    signal.signal(signal.SIGHUP, again)
    web.run()
    if server.engine.failure:
        raise RunError(f"the engine has ended: {server.engine.failure}")


def _reload(server: Server) -> None:
    """Nobody waits for the result, so it is logged."""
    assert server.folder
    try:
        version = server.folder.reload(server.engine)
    except Exception:  # whatever is wrong with the folder, the old weights are served on
        _log.exception("the weights were not read again")
    else:
        _log.warning("version %d of the weights is served now", version)
