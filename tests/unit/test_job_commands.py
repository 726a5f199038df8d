"""`opdlm submit | jobs | stop` without a cluster: what is submitted, and what Ctrl-C asks."""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from common.config.errors import ConfigError
from common.config.file import REPOSITORY, load_config
from deploy import cli
from deploy.commands import jobs as job_commands

JOB = "raysubmit_1"


class FakeClient:
    """A cluster with one job, which runs until it is stopped."""

    def __init__(self) -> None:
        self.status = "RUNNING"
        self.submitted: dict = {}

    def submit_job(self, **options) -> str:
        self.submitted = options
        return JOB

    def list_jobs(self) -> list:
        return [SimpleNamespace(submission_id=JOB)]

    def get_job_status(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.status)

    def stop_job(self, job: str) -> None:
        self.status = "STOPPED"


@pytest.fixture
def client(monkeypatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(job_commands, "_client", lambda address: fake)
    return fake


def submit(*arguments: str, answer: str = ""):
    return CliRunner().invoke(cli.app, ["submit", *arguments], input=answer)


@pytest.mark.parametrize(("answer", "status"), [("n\n", "RUNNING"), ("\n", "RUNNING"), ("y\n", "STOPPED")])
def test_ctrl_c_asks_whether_to_stop_the_job(client, monkeypatch, answer, status):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job_commands, "_follow", interrupted)
    result = submit("tiny", answer=answer)
    assert "stop the job?" in result.output
    assert (result.exit_code, client.status) == (130, status)


def test_the_job_runs_the_uploaded_folder_and_writes_where_the_user_is(client, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    result = submit("tiny", "--learner.lr", "1e-3", "--resume", "auto", "--no-wait", "--working-dir", str(REPOSITORY))
    assert result.exit_code == 0 and JOB in result.output
    words = shlex.split(client.submitted["entrypoint"])
    assert words[:5] == ["python", "-m", "deploy", "train", "tiny"]
    assert words[5:] == ["--learner.lr", "1e-3", "--output_dir", str(tmp_path / "runs"), "--resume", "auto"]
    environment = client.submitted["runtime_env"]
    assert environment["working_dir"] == str(REPOSITORY)
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120", "OPDLM_SUBMITTED_FROM": str(REPOSITORY)}

    submit("tiny", "--output_dir", "/shared/runs", "--no-wait")
    assert shlex.split(client.submitted["entrypoint"])[5:] == ["--output_dir", "/shared/runs"]


def test_a_config_file_is_named_as_the_job_finds_it(client, monkeypatch, tmp_path):
    (tmp_path / "inside").mkdir()
    file = tmp_path / "inside" / "mine.yaml"
    file.write_bytes(Path(REPOSITORY / "deploy/presets/tiny.yaml").read_bytes())
    monkeypatch.chdir(file.parent)
    assert submit("mine.yaml", "--no-wait", "--working-dir", "..").exit_code == 0
    assert shlex.split(client.submitted["entrypoint"])[4] == "inside/mine.yaml"
    with pytest.raises(ConfigError, match=r"CONFIG: .* is not below"):
        CliRunner().invoke(cli.app, ["submit", str(file), "--working-dir", str(REPOSITORY)], catch_exceptions=False)


def options_of(client: FakeClient) -> dict[str, str]:
    """The last value of every override in the job's command."""
    words = shlex.split(client.submitted["entrypoint"])[5:]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_paths_of_a_job_mean_what_they_mean_here(client, monkeypatch, tmp_path):
    home, project, data = tmp_path / "home", tmp_path / "project #1", tmp_path / "data"
    for folder in (home, project / "sub", data):
        folder.mkdir(parents=True)
    for file in (home / "tokens", project / "sub/prompts.jsonl", project / "answers.jsonl", data / "problems.jsonl"):
        file.touch()
    (project / "sub/mine.yaml").write_text(
        "model: {path: Qwen/Qwen3-8B}\nteacher: {path: deploy/models/tiny-arlm}\n"
        "data: {prompts: prompts.jsonl, responses: ../answers.jsonl}\n"
        "evaluation: {problems: ../../data/problems.jsonl}\n"
        "dashboard: {token_file: ~/tokens}\npipeline: {copy_checkpoints_to: $HOME/copies}\noutput_dir: ../runs\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(project / "sub")
    assert submit("mine.yaml", "--no-wait", "--working-dir", "..").exit_code == 0
    assert shlex.split(client.submitted["entrypoint"])[4] == "sub/mine.yaml"
    assert options_of(client) == {
        "--output_dir": str(project / "runs"),
        "--pipeline.copy_checkpoints_to": str(home / "copies"),
        "--data.prompts": "sub/prompts.jsonl",
        "--data.responses": "answers.jsonl",
        "--evaluation.problems": str(data / "problems.jsonl"),
        "--dashboard.token_file": str(home / "tokens"),
    }
    # the job is where the folder was uploaded to: with what the command says, it finds the same
    monkeypatch.chdir(project)
    words = shlex.split(client.submitted["entrypoint"])[4:]
    here = load_config(words[0], words[1:])
    assert [os.path.realpath(p) for p in (here.data.prompts, here.data.responses, here.evaluation.problems)] == [
        str(project / "sub/prompts.jsonl"), str(project / "answers.jsonl"), str(data / "problems.jsonl")
    ]  # fmt: skip
    assert (here.model.path, here.teacher.path) == ("Qwen/Qwen3-8B", str(REPOSITORY / "deploy/models/tiny-arlm"))


def test_absolute_paths_urls_and_paths_of_the_cluster_stay(client, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    typed = {
        "--output_dir": "/shared/runs",
        "--model.path": "/shared/model",
        "--data.prompts": "on/the/cluster.jsonl",
        "--pipeline.copy_checkpoints_to": "s3://bucket/~/x",
        "--name": "1.10",
        "--wandb.project": "a #b",
    }
    assert submit("tiny", *(part for item in typed.items() for part in item), "--no-wait").exit_code == 0
    assert options_of(client) == typed


def test_what_was_not_uploaded_is_found_where_the_job_was_submitted_from(client, monkeypatch, tmp_path):
    here, job = tmp_path / "here", tmp_path / "job"
    (here / "runs").mkdir(parents=True)
    job.mkdir()
    (here / "runs/answers.parquet").touch()  # runs/ is not uploaded
    (here / "mine.yaml").write_bytes(Path(REPOSITORY / "deploy/presets/tiny.yaml").read_bytes())
    monkeypatch.chdir(here)
    assert submit("mine.yaml", "--data.responses", "runs/answers.parquet", "--no-wait").exit_code == 0
    words = shlex.split(client.submitted["entrypoint"])[4:]
    monkeypatch.chdir(job)
    monkeypatch.setenv("OPDLM_SUBMITTED_FROM", client.submitted["runtime_env"]["env_vars"]["OPDLM_SUBMITTED_FROM"])
    assert load_config(words[0], words[1:]).data.responses == str(here / "runs/answers.parquet")
    (job / "runs").mkdir()
    (job / "runs/answers.parquet").touch()
    assert load_config(words[0], words[1:]).data.responses == "runs/answers.parquet"


def test_bad_input_is_refused_before_anything_is_uploaded(client):
    assert submit("tiny", "--resume", "always").exit_code == 2
    with pytest.raises(ConfigError, match=r"learner\.lrr"):
        CliRunner().invoke(cli.app, ["submit", "tiny", "--learner.lrr", "1"], catch_exceptions=False)
    assert client.submitted == {}
    with pytest.raises(ConfigError, match="'raysubmit_2' is not on"):
        CliRunner().invoke(cli.app, ["stop", "raysubmit_2"], catch_exceptions=False)


@pytest.mark.parametrize("command", [["jobs"], ["stop", JOB], ["submit", "tiny"]])
def test_a_cluster_that_never_answers_ends_the_command_at_its_deadline(command):
    with socket.socket() as silent:  # connections are made, and nothing is ever read
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = (
            "import sys; from deploy import cli; from deploy.commands import jobs; jobs._CALL_TIMEOUT_S = 1.0; "
            f"sys.argv = {['opdlm', *command, '--address', address]!r}; cli.main()"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        assert process.stderr
        try:
            said = process.stderr.readline()
            reported = time.monotonic()
            status = process.wait(timeout=20)
            seconds = time.monotonic() - reported
        finally:
            process.kill()
    assert "no answer within 1 s" in said
    assert status == 2
    assert seconds < 5
