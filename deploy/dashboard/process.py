"""The dashboard as a process of its own beside the run, so that a visitor never slows the control loop."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.config.dashboard import DashboardConfig
from common.config.errors import ConfigError
from common.config.shown import shown
from deploy.child_environment import child_environment

_LEAST_TOKEN = 16
_FAREWELL_SECONDS = 2.5  # open pages hear of the run's end before the server goes


def read_token(file: str | None, field: str = "dashboard.token_file") -> str | None:
    """The token in a text file.

    Raises:
        ConfigError: the file is missing or the token too short to be one.
    """
    if file is None:
        return None
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{field}: {file!r} does not exist; write a token of {_LEAST_TOKEN} characters or more to it")
    token = path.read_text().strip()
    if len(token) < _LEAST_TOKEN:
        raise ConfigError(
            f"{field}: {file!r} holds {len(token)} characters; make a longer token, such as: openssl rand -hex 16"
        )
    return token


def free_port(host: str, port: int, field: str = "dashboard.port") -> int:
    """The port itself, or a free one for 0.

    Raises:
        ConfigError: it is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, TypeError, UnicodeError) as error:  # the latter two for what cannot be a host's name
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{field}: cannot bind {shown(host)[1:-1]}:{port} ({why}); choose another port, or 0 for any free one"
            ) from error
        return int(s.getsockname()[1])


class DashboardProcess:
    """Life cycle: entered before the run's models load, left when the run has ended; nothing where it is not enabled.

    `url` is the page's address, empty where there is no page.
    """

    def __init__(self, run_dir: Path, config: DashboardConfig) -> None:
        self.run_dir = run_dir
        self.config = config
        self.url = ""

    def __enter__(self) -> DashboardProcess:
        if self.config.enabled:
            port = free_port(self.config.host, self.config.port)
            command = [sys.executable, "-m", "deploy.dashboard", str(self.run_dir.resolve())]
            command += ["--host", self.config.host, "--port", str(port), "--with-parent"]
            if self.config.token_file:
                command += ["--token-file", self.config.token_file]
            # a session of its own: Ctrl-C ends the run first, and the page can still show it
            self._process = subprocess.Popen(
                command, env=child_environment(), stdin=subprocess.DEVNULL, start_new_session=True
            )
            self.url = address(self.config.host, port)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.url:
            time.sleep(_FAREWELL_SECONDS)
            self._process.kill()  # it ignores other signals, and only reads files
            self._process.wait()


def address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
