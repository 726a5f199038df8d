"""`opdlm dashboard RUN`: the page of a finished, copied or running run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.config.dashboard import is_loopback
from common.config.errors import ConfigError
from deploy.argument_checks import a_path
from deploy.commands.console import say


def register(app: typer.Typer) -> None:
    app.command()(dashboard)


def dashboard(
    run: Annotated[Path, typer.Argument(help="folder of a run", metavar="RUN", callback=a_path)],
    host: Annotated[str, typer.Option(help="address to listen on; any but loopback needs --token-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free one")] = 8270,
    token_file: Annotated[
        str | None, typer.Option(help="text file with the token that visitors must give", callback=a_path)
    ] = None,
) -> None:
    """Show the page of a run that is running, finished, or copied from elsewhere.

    [bold]Examples[/bold]

        opdlm dashboard runs/tiny
        ssh -L 8270:127.0.0.1:8270 machine opdlm dashboard runs/tiny
    """
    from deploy.dashboard.process import address, free_port, read_token
    from deploy.dashboard.run_reader import check_run_folder
    from deploy.dashboard.server import serve

    check_run_folder(run)
    if not is_loopback(host) and token_file is None:
        raise ConfigError(
            f"--host: {host!r} can be reached from other machines, so a token is required: give --token-file, or bind "
            "127.0.0.1 and forward the port (ssh -L)"
        )
    token = read_token(token_file, "--token-file")
    port = free_port(host, port, "--port")
    page = address(host, port) + ("/?token=..." if token else "")
    say(f"{run} is at {page} (Ctrl-C ends this)")
    serve(run, host, port, token)
