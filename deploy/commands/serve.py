"""`opdlm serve`: OpenAI's API on the block-diffusion sampler."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
    Adapter,
    BlockSize,
    DtypeName,
    Lower,
    Rule,
    RuleName,
    Student,
    Temperature,
    Threshold,
    Verify,
)
from deploy.serving.options import LONGEST, Replicas, ServingOptions

_LEAST_KEY = 16
_USAGE_ERROR: Any = typer.BadParameter.__base__  # of the click that typer brings


class Asked(NamedTuple):
    """The options of the command, read and checked."""

    options: ServingOptions
    replicas: Replicas
    port: int
    drain_seconds: int
    ray_address: str | None


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def asked(
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
    name: Annotated[str | None, typer.Option(help="the model's name in the API; default: the student's folder")] = None,
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
        str,
        typer.Option(
            metavar="N|LEAST:MOST",
            help="processes that serve behind the port, each on a GPU where there are any; two numbers: between them, "
            "as many as the requests need",
        ),
    ] = "1",
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster of the replicas, auto or HOST:PORT; default: started here"),
    ] = None,
    adapter: Adapter = None,
    compare: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the original, which the page shows beside the student", callback=a_path),
    ] = None,
    rule: Rule = RuleName.dynamic,
    threshold: Threshold = DEFAULT_THRESHOLD,
    lower: Lower = DEFAULT_LOWER,
    verify: Verify = "self",
    block_size: BlockSize = None,
    temperature: Temperature = 0.0,
    dtype: DtypeName = "float32",
    thinking: Thinking = None,
    system: System = None,
) -> Asked:
    """Serve a student: OpenAI's API and a page to chat with it, decoded by block diffusion.

    Requests may bring settings of their own.

    [bold]Examples[/bold]

        opdlm serve runs/tiny/checkpoints/final

        opdlm serve runs/tiny/checkpoints/final --compare deploy/models/tiny-arlm

        opdlm serve runs/tiny/checkpoints/final --host 0.0.0.0 --api-key-file key.txt --replicas 4
    """
    key = _key(api_key, api_key_file)
    if not is_loopback(host) and key is None:
        raise ConfigError(
            f"--host: {host!r} can be reached from other machines, so an API key is required: give --api-key-file, or "
            "bind 127.0.0.1 and forward the port (ssh -L)"
        )
    count = Replicas.parsed(replicas)
    from deploy.model_checks import StudentPath, check_model_folder, check_student_folder, verifier_of
    from deploy.serving.loading import check_options

    at = StudentPath.of(model, adapter)
    check_student_folder(at.field, at.folder, at.base)
    # clients may ask for the speculative rule where the original verifies, whatever the server's own rule is
    verifier = verifier_of(verify, at, [rule] if verify == "self" else [RuleName.speculative])
    if compare is not None:
        check_model_folder("--compare", compare)
    options = ServingOptions(
        student=at,
        verifier=verifier,
        name=name or at.folder,
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
    return Asked(options, count, port, drain, ray_address)


@functools.wraps(asked)
def serve(**given: Any) -> None:
    from deploy.dashboard.process import address, free_port

    options, replicas, port, drain, ray_address = asked(**given)
    port = free_port(options.host, port, "--port")
    where = f"{options.name} is at {address(options.host, port)} (API: /v1, metrics: /metrics; Ctrl-C ends this)"
    if replicas.most > 1 or ray_address:
        from deploy.serving.replicas import serve_replicas

        serve_replicas(options, replicas, port, drain, ray_address, ready=lambda: say(where))
        return
    from deploy.serving.loading import load_server
    from deploy.serving.process import serve as run

    server = load_server(options)
    say(where)
    run(server, port, drain)


def application(args: dict[str, Any]) -> Any:
    """What Ray Serve's config files name as `import_path`: the replicas of `opdlm serve`."""
    from deploy.serving.replicas import application as application_of

    read = asked_in_file(args)
    return application_of(read.options, read.replicas, read.drain_seconds)


def asked_in_file(args: dict[str, Any]) -> Asked:
    """The `args` of an application in a config file of Ray Serve: options of `opdlm serve`, and `model` for its
    argument. The file itself has the port, in `http_options`.

    Raises:
        ConfigError: there is no model, or an option is none, has a wrong value, or does not fit the model.
    """
    if "model" not in args:
        raise ConfigError("args: there is no model; name the student's folder")
    if elsewhere := {"port", "ray_address"} & args.keys():
        raise ConfigError(f"args: {', '.join(sorted(elsewhere))}: the config file has it itself; see http_options")
    words = []
    for name, value in args.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif name != "model":
            words.append(f"--{option}={value}")
    command = typer.Typer(add_completion=False)
    command.command()(asked)
    try:
        read: Asked = typer.main.get_command(command).main([*words, "--", str(args["model"])], standalone_mode=False)
    except _USAGE_ERROR as error:
        raise ConfigError(f"args: {error.format_message()}") from error
    return read


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
