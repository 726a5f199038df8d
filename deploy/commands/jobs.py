"""`opdlm submit | jobs | stop`: training jobs on a Ray cluster, by Ray's JobSubmissionClient.

They differ from Ray's own commands in three ways: `submit` ends with the job's exit status (`ray job submit` ends with
1 for every failed job), a failed job is an error (`ray job status` ends with 0), and every call has a deadline
(`ray job stop` can hang on a pending job).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.table import Table

from common.config.errors import ConfigError
from common.config.fields import path_fields
from common.config.file import SUBMITTED_FROM, load_config, merged, validated, value_at
from common.config.paths import expanded
from common.config.run import RunConfig
from common.config.yaml_loader import Scalar
from deploy.argument_checks import a_path, finite
from deploy.commands.config_argument import TAKES_OVERRIDES
from deploy.commands.console import console
from deploy.errors import StuckError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CALL_TIMEOUT_S = 60.0
_FINAL = {"SUCCEEDED", "FAILED", "STOPPED"}
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # of the job: seconds between SIGTERM and SIGKILL, for the last checkpoint
_STOP_WAIT_S = 120
_POLL_S = 0.5
_PENDING_S = 15.0  # a job that waits longer than this for CPUs is left to its end
_COMMAND = "python -m deploy "  # works where the package is uploaded and not installed
_COMMAND_CHARACTERS = 80  # of a job's command in the list; `ray job list` has it whole
_T = TypeVar("_T")

Address = Annotated[str, typer.Option(help="the cluster's dashboard address", envvar="RAY_API_SERVER_ADDRESS")]


def register(app: typer.Typer) -> None:
    app.command(**TAKES_OVERRIDES)(submit)
    app.command()(jobs)
    app.command()(stop)


def submit(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file below the working directory, or a preset", metavar="CONFIG")],
    address: Address = DEFAULT_ADDRESS,
    working_dir: Annotated[Path, typer.Option(help="folder to upload; the job runs in it", callback=a_path)] = Path(
        "."
    ),
    resume: Annotated[
        Literal["auto"] | None, typer.Option(help="auto: continue from the run's newest checkpoint")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="print the job's id and end")] = False,
) -> None:
    """Submit a training job to a Ray cluster, print its log, and end with the job's exit status.

    Options that are not listed here override fields of the config, as in [bold]opdlm train[/bold]. In paths, `~`,
    variables and relative paths are expanded here, before the job is sent.

    [bold]Examples[/bold]

        opdlm submit tiny --output_dir /shared/runs --name first --dashboard.enabled true
        opdlm submit tiny --output_dir /shared/runs --name first --resume auto --no-wait
    """
    if not working_dir.is_dir():
        wrong = "is a file" if working_dir.exists() else "does not exist"
        raise ConfigError(f"--working-dir: {str(working_dir)!r} {wrong}; give the folder to upload")
    load_config(config, context.args)  # bad input ends here, before anything is uploaded
    command = [*_COMMAND.split(), "train", _uploaded(config, working_dir), *context.args]
    command += _paths_of_job(merged(config, context.args), working_dir)
    command += ["--resume", resume] if resume else []
    client = _client(address)
    job = _within(
        lambda: client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={
                "working_dir": str(working_dir.resolve()),
                "env_vars": {
                    _STOP_WAIT: os.environ.get(_STOP_WAIT, str(_STOP_WAIT_S)),
                    SUBMITTED_FROM: str(working_dir.resolve()),
                },
            },
        ),
        f"submitting to {address}",
    )
    console.print(f"job [bold]{job}[/bold] on {address}", highlight=False)
    if no_wait:
        console.print(f"follow it with: ray job logs --follow {job} --address {address}", highlight=False)
        return
    try:
        info = _follow(client, job, address)
    except KeyboardInterrupt:
        if typer.confirm("\nstop the job? (no: the job continues, only this command ends)", default=False):
            stop(job, address)
        raise typer.Exit(130) from None
    raise typer.Exit(_exit_status(info, job))


def _uploaded(config: str, working_dir: Path) -> str:
    """A config file's path inside the folder that is uploaded; a preset's name as it is."""
    file, folder = Path(expanded(config)).resolve(), working_dir.resolve()
    if not file.is_file():
        return config
    if not file.is_relative_to(folder):
        raise ConfigError(
            f"CONFIG: {config!r} is not below {str(folder)!r}, the folder that is uploaded, so the job would not find "
            "it; copy it there, or name another folder with --working-dir"
        )
    return str(file.relative_to(folder))


def _paths_of_job(raw: dict[str, Any], working_dir: Path) -> list[str]:
    """Overrides for the paths that would mean something else in the job, which has another current folder and home.

    What is below the folder that is uploaded is named as it is found there, anything else by its absolute path. A path
    that is neither here nor absolute is the job's own to find.
    """
    config = validated(RunConfig, raw)
    folder = os.path.abspath(working_dir)
    options: list[str] = []
    for field in (*path_fields("output"), *path_fields("input")):
        value = str(value_at(config, field) or "")
        place = os.path.abspath(value)
        if not value or "://" in value:
            continue
        if field in path_fields("output"):
            meant = place
        elif not os.path.exists(value) or (os.path.isabs(value) and not Path(place).is_relative_to(folder)):
            meant = value
        else:
            meant = os.path.relpath(place, folder) if Path(place).is_relative_to(folder) else place
        if meant != _typed(raw, field):
            options += [f"--{field}", meant]
    return options


def _typed(raw: dict[str, Any], field: str) -> str | None:
    """The text of a field in the file or its override; None where it is left out."""
    node: Any = raw
    for name in field.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node.text if isinstance(node, Scalar) else node


def jobs(address: Address = DEFAULT_ADDRESS) -> None:
    """List the cluster's jobs, newest first."""
    table = Table()
    for column in ("job", "status", "exit", "minutes"):
        table.add_column(column, no_wrap=True)  # an id is there to be copied
    table.add_column("command", overflow="fold")
    listed = _within(_client(address).list_jobs, f"asking {address}")
    for info in sorted(listed, key=lambda i: -(i.start_time or 0)):
        end = info.end_time or time.time() * 1000
        minutes = f"{(end - info.start_time) / 60_000:.1f}" if info.start_time else ""
        status = "" if info.driver_exit_code is None else str(info.driver_exit_code)
        command = textwrap.shorten(info.entrypoint.removeprefix(_COMMAND), _COMMAND_CHARACTERS, placeholder=" …")
        table.add_row(info.submission_id or "", str(info.status.value), status, minutes, command)
    console.print(table)


def stop(
    job: Annotated[str, typer.Argument(help="the job's id, as opdlm jobs lists it", metavar="JOB")],
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Annotated[
        float, typer.Option(min=0, help="how long to wait until the job has ended", callback=finite)
    ] = _STOP_WAIT_S + 30.0,
) -> None:
    """Stop a job.

    The job writes a checkpoint before it ends. A job that still waits for CPUs ends as soon as it gets them.
    """
    client = _client(address)
    listed = {info.submission_id for info in _within(client.list_jobs, f"asking {address}")}
    if job not in listed:
        raise ConfigError(f"JOB: {job!r} is not on {address}; `opdlm jobs` lists the jobs that are")
    status = _within(lambda: client.get_job_status(job), f"asking {address}").value
    if status in _FINAL:
        console.print(f"{job} has ended already: {status}")
        return
    _within(lambda: client.stop_job(job), f"stopping {job}")
    begin = time.monotonic()
    while status not in _FINAL:
        waited = time.monotonic() - begin
        if status == "PENDING" and waited > _PENDING_S:
            raise StuckError(
                f"{job} is pending: it still waits for the CPUs that its driver asks for, so there is nothing to stop "
                "yet. It ends as soon as it gets them, or fails 15 minutes after it was submitted "
                "(RAY_JOB_START_TIMEOUT_SECONDS of the head)"
            )
        if waited > timeout_s:
            raise StuckError(f"{job} is still {status} after {timeout_s:.0f} s; see `ray job logs {job}`")
        time.sleep(_POLL_S)
        status = _within(lambda: client.get_job_status(job), f"asking {address}").value
    console.print(f"{job}: {status}")


def _follow(client: Any, job: str, address: str) -> Any:
    """Print the job's log until its end; returns Ray's JobDetails.

    Raises:
        StuckError: the cluster no longer answers.
    """
    from aiohttp import ClientError

    log = _Log(client, job)
    while True:
        try:
            asyncio.run(log.print_on())
        except (RuntimeError, ClientError) as error:
            console.print(f"the connection to the job's log broke ({error}); trying again", highlight=False)
        time.sleep(_POLL_S)  # the log ends a moment before the status is final
        try:
            info = _within(lambda: client.get_job_info(job), f"asking for {job}")
        except (RuntimeError, OSError) as error:
            raise StuckError(
                f"{address} no longer answers, so nothing is known of {job}: its head has died, or the network is cut. "
                "A job ends with its head; continue it with --resume auto"
            ) from error
        if info.status.value in _FINAL:
            return info


class _Log:
    """A job's log on this terminal: `print_on` prints what was not printed yet, until the connection ends."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job = client, job
        self._printed = 0

    async def print_on(self) -> None:
        seen = 0  # characters: Ray sends the whole log on every connection
        async for text in self._client.tail_job_logs(self._job):
            print(text[max(self._printed - seen, 0) :], end="", flush=True)
            seen += len(text)
            self._printed = max(self._printed, seen)


def _exit_status(info: Any, job: str) -> int:
    """The driver's exit status, 128 + the signal where one ended it; 1 where the job was stopped or had no driver."""
    if info.status.value == "SUCCEEDED":
        return 0
    reason = info.message.partition(", last available logs")[0]  # they have just been printed
    console.print(f"job {job}: {info.status.value}: {reason}", highlight=False, soft_wrap=True)
    status = int(info.driver_exit_code or 1)
    return status if status > 0 else 128 - status


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in (JobSubmissionClient.__module__, "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(module).setLevel(logging.WARNING)  # its import sets INFO
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # lists every file that is not uploaded
    try:
        return _within(lambda: JobSubmissionClient(address), f"connecting to {address}")
    except AuthenticationError as error:
        raise ConfigError(
            f"--address {address!r}: the cluster asks for a token, and this one is missing or wrong; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to the cluster's"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--address: {address!r} is no address ({error}); give one like {DEFAULT_ADDRESS}") from error
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"--address {address!r}: no cluster answers ({error}); is `ray start --head` running there?"
        ) from error


def _within(call: Callable[[], _T], action: str) -> _T:
    """The call's result, or StuckError after a minute: Ray's HTTP calls have no deadline of their own.

    The thread is a daemon, so that a call that never returns does not keep the process from ending.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout=_CALL_TIMEOUT_S)
    except FutureTimeout as error:
        raise StuckError(f"{action}: no answer within {_CALL_TIMEOUT_S:.0f} s") from error
