"""`opdlm serve`: OpenAI's API on the block-diffusion sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.config.dashboard import is_loopback
from common.config.errors import ConfigError
from deploy.argument_checks import a_path, finite
from deploy.commands.console import say
from deploy.commands.generate import DEFAULT_MAX_TOKENS
from deploy.evaluation.asking import System, Thinking
from deploy.evaluation.decoding_options import (
    DEFAULT_LOWER,
    DEFAULT_THRESHOLD,
    BlockSize,
    DtypeName,
    Lower,
    Rule,
    RuleName,
    Student,
    Temperature,
    Threshold,
)
from deploy.serving.options import LONGEST, MOST_REPLICAS, ServingOptions

_LEAST_KEY = 16


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    model: Student,
    host: Annotated[str, typer.Option(help="address to listen on; any but loopback needs an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="key that clients must send, 16 characters or more; or OPDLM_API_KEY", envvar="OPDLM_API_KEY"
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(help="text file with the API key, which other users' `ps` does not show", callback=a_path),
    ] = None,
    name: Annotated[str | None, typer.Option(help="the model's name in the API; default: MODEL")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="sequences decoded at the same time; default: 8, on a GPU 64")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help=f"prompt and response together, tokens; default: {LONGEST}, or less where positions end"
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="response limit of a request that names none, tokens")
    ] = DEFAULT_MAX_TOKENS,
    queue: Annotated[int, typer.Option(min=0, help="sequences that may wait for a slot; more are refused")] = 256,
    prefix_cache: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="tokens kept for prompts that begin alike, such as a chat's history; default: a quarter of what the "
            "slots hold; 0: none",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="seconds that a request may take, its wait included", callback=finite)
    ] = 600.0,
    drain: Annotated[int, typer.Option(min=0, help="seconds that running requests get when the server ends")] = 30,
    replicas: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_REPLICAS, help="processes that serve behind the port, each on a GPU where there are any"
        ),
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster of the replicas, auto or HOST:PORT; default: started here"),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the original, which the page shows beside the student", callback=a_path),
    ] = None,
    rule: Rule = RuleName.dynamic,
    threshold: Threshold = DEFAULT_THRESHOLD,
    lower: Lower = DEFAULT_LOWER,
    block_size: BlockSize = None,
    temperature: Temperature = 0.0,
    dtype: DtypeName = "float32",
    thinking: Thinking = None,
    system: System = None,
) -> None:
    """Serve a student: OpenAI's API and a page to chat with it, decoded by block diffusion.

    Requests may bring settings of their own.

    [bold]Examples[/bold]

        opdlm serve runs/tiny/checkpoints/final

        opdlm serve runs/tiny/checkpoints/final --compare deploy/models/tiny-arlm

        opdlm serve runs/tiny/checkpoints/final --host 0.0.0.0 --api-key-file key.txt --replicas 4
    """
    if rule == RuleName.speculative:
        raise ConfigError(
            "--rule: 'speculative' does not run beside other rules, which clients may ask for; use dynamic"
        )
    key = _key(api_key, api_key_file)
    if not is_loopback(host) and key is None:
        raise ConfigError(
            f"--host: {host!r} can be reached from other machines, so an API key is required: give --api-key-file, or "
            "bind 127.0.0.1 and forward the port (ssh -L)"
        )
    from deploy.dashboard.process import address, free_port
    from deploy.model_checks import check_model_folder, check_student_folder
    from deploy.serving.loading import check_options, load_server

    check_student_folder("MODEL", model)
    if compare is not None:
        check_model_folder("--compare", compare)
    options = ServingOptions(
        model=model,
        name=name or model,
        host=host,
        api_key=key,
        slots=slots,
        max_length=max_length,
        max_tokens=max_tokens,
        queue=queue,
        prefix_cache=prefix_cache,
        timeout=timeout,
        compare=compare,
        decoding=(rule, threshold, lower),
        block_size=block_size,
        temperature=temperature,
        dtype=dtype,
        thinking=thinking,
        system=system,
    )
    check_options(options)
    port = free_port(host, port, "--port")
    where = f"{options.name} is at {address(host, port)} (API: /v1, metrics: /metrics; Ctrl-C ends this)"
    if replicas > 1 or ray_address:
        from deploy.serving.replicas import serve_replicas

        serve_replicas(options, replicas, port, drain, ray_address, ready=lambda: say(where))
        return
    from deploy.serving.process import serve as run

    server = load_server(options)
    say(where)
    run(server, port, drain)


def _key(given: str | None, file: str | None) -> str | None:
    """The API key.

    Raises:
        ConfigError: there are two, it is too short to be one, or its file is missing.
    """
    if given is not None and file is not None:
        raise ConfigError("--api-key: there is --api-key-file too; give one of them")
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"--api-key-file: {file!r} does not exist; write a key of {_LEAST_KEY} characters to it")
        given = path.read_text().strip()
    if given is not None and len(given) < _LEAST_KEY:
        raise ConfigError(
            f"--api-key: it has {len(given)} characters; make a longer one, such as: openssl rand -hex 16"
        )
    return given
