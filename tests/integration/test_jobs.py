"""`ray job submit` and `opdlm submit | jobs | stop` on real heads: success, failure, stop, resume, tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.monitoring.grafana import queries
from tests.heads import RAY, Head
from tests.prometheus import Prometheus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
BATCHES = 30  # enough for two stops to come before the end
TINY = [
    "tiny", "--teacher.backend", "transformers", "--evaluation.problems", "null", "--learner.ranks", "1",
    "--learner.warmup_batches", "1", "--rollout.actors", "1", "--rollout.prompts_per_batch", "16",
    "--pipeline.max_batches", str(BATCHES),
]  # fmt: skip
EVALUATED = [
    "--evaluation.problems", "deploy/data/word_problems_heldout.jsonl", "--evaluation.count", "4",
    "--evaluation.max_new_tokens", "16", "--evaluation.every_batches", "8", "--evaluation.teacher", "false",
]  # fmt: skip
SAME = ("loss", "kl", "lr", "response_tokens", "updates", "weights_version", "response_limit")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Open to everyone on this machine, CPUs on the head."""
    with Head(num_cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this file write: the head and the tests see the same disk."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def prometheus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """Scrapes the head while its jobs run; None where it is not installed."""
    program = shutil.which("prometheus")
    if not program:
        yield None
        return
    with Prometheus(program, tmp_path_factory.mktemp("prometheus"), head.metrics_discovery) as started:
        yield started


@pytest.fixture(scope="module")
def whole(head: Head, prometheus: Prometheus | None, runs: Path) -> list[dict[str, float]]:
    """The metrics of a run that was never stopped, submitted with Ray's own command."""
    done = head.command(
        RAY, "job", "submit", "--address", head.address, "--working-dir", ".", "--",
        "python", "-m", "deploy", "train", *TINY, *EVALUATED, "--name", "whole", "--output_dir", str(runs),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"batch {BATCHES}/{BATCHES}" in done.stdout  # the progress reaches the terminal
    return metrics(runs / "whole")


def opdlm(head: Head, command: str, *words: str, status: int = 0) -> str:
    """Run `opdlm COMMAND` against the head; returns what it printed, on one line."""
    done = head.command(sys.executable, "-m", "deploy", command, *words, "--address", head.address)
    assert done.returncode == status, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_batch(number: int, head: Head, job: str, folder: Path, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while len(metrics(folder)) < number:
        if time.monotonic() > deadline:
            pytest.fail(head.command(RAY, "job", "logs", "--address", head.address, job).stdout)
        time.sleep(0.1)


def job_of(text: str) -> str:
    return re.findall(r"raysubmit_\w+", text)[0]


def saved_batches(folder: Path) -> int:
    """Batches that the newest checkpoint of a stopped run holds."""
    *_, newest = sorted((folder / "checkpoints").glob("batch-*/manifest.json"))
    return int(newest.parent.name.removeprefix("batch-"))


def assert_same_run(resumed: Path, whole: list[dict[str, float]]) -> None:
    rows = metrics(resumed)
    assert [m["batch"] for m in rows] == list(range(BATCHES))
    for a, b in zip(whole, rows, strict=True):
        assert {k: b[k] for k in SAME} == pytest.approx({k: a[k] for k in SAME}, rel=1e-5), a["batch"]
    assert (resumed / "checkpoints" / "final" / "model.safetensors").exists()


def test_ray_job_submit_leaves_the_runs_files(whole: list[dict[str, float]], runs: Path) -> None:
    assert [m["batch"] for m in whole] == list(range(BATCHES))
    for file in ("config.yaml", "summary.json", "tensorboard", "checkpoints/final/model.safetensors"):
        assert (runs / "whole" / file).exists(), file


# of objectives and evaluations that this run does not have
OF_OTHER_RUNS = ("part_", "trusted_share", "eval_held_out_")


def test_every_query_of_the_grafana_dashboard_has_data(
    whole: list[dict[str, float]], prometheus: Prometheus | None
) -> None:
    if prometheus is None:
        pytest.skip("prometheus is not installed (Debian's package of that name): nothing scraped the run")
    begin, end = whole[0]["time"] - 300, whole[-1]["time"] + 60
    asked = [query for query in queries() if not any(f"opdlm_{name}" in query for name in OF_OTHER_RUNS)]
    empty = [query for query in asked if not prometheus.series(query.replace("$run", "whole"), begin, end)]
    assert empty == []
    (kl,) = prometheus.series('max by (run) (ray_opdlm_kl{run="whole"})', begin, end)
    logged = [m["kl"] for m in whole]
    assert all(min(abs(float(value) / each - 1) for each in logged) < 1e-6 for _, value in kl["values"])
    actors = prometheus.series("max by (actor) (ray_opdlm_actor_heard)", begin, end)
    assert {s["metric"]["actor"] for s in actors} == {"rollout-0", "teacher-0", "learner-0"}


def test_failed_job_ends_with_its_own_status(head: Head, runs: Path) -> None:
    bad_prompts = [*TINY, "--name", "failed", "--output_dir", str(runs), "--data.prompts", "nowhere.jsonl"]
    text = opdlm(head, "submit", *bad_prompts, status=2)
    assert "data.prompts" in text and "nowhere.jsonl" in text

    too_large = ["--learner.resources.cpus", "64", "--ray.placement_timeout_s", "3", "--name", "large"]
    start = time.monotonic()
    text = opdlm(head, "submit", *TINY, *too_large, "--output_dir", str(runs), status=2)
    assert "asks for 64.5 CPUs" in text and "learner 1 x 64" in text and "Ray has 2" in text
    assert time.monotonic() - start < 250, "waited for the default deadline"


def test_stop_does_not_wait_for_a_pending_job(head: Head) -> None:
    command = ["--no-wait", "--entrypoint-num-cpus", "99", "--", "true"]
    submitted = head.command(RAY, "job", "submit", "--address", head.address, *command)
    assert "is pending: it still waits" in opdlm(head, "stop", job_of(submitted.stdout), status=1)
    assert "JOB: 'raysubmit_0' is not on" in opdlm(head, "stop", "raysubmit_0", status=2)


def test_upload_is_small_and_leaves_runs_out(tmp_path: Path) -> None:
    """The package that Ray makes of the working directory, built by Ray's own code."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from ray._private.runtime_env.packaging import create_package\n"
        "create_package(sys.argv[1], Path(sys.argv[2]), include_gitignore=True)"
    )
    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    for litter in ("runs/tiny/checkpoints/final/model.safetensors", ".venv/lib/a.so", "deploy/__pycache__/cli.pyc"):
        (folder / litter).parent.mkdir(parents=True, exist_ok=True)
        (folder / litter).write_bytes(os.urandom(2**20))
    package = tmp_path / "package.zip"
    subprocess.run([sys.executable, "-c", code, str(folder), str(package)], check=True, capture_output=True)
    from zipfile import ZipFile

    names = set(ZipFile(package).namelist())
    assert {"deploy/presets/tiny.yaml", "deploy/models/tiny-arlm/model.safetensors", "learner/rank.py"} <= names
    assert not [n for n in names if n.startswith(("runs/", ".venv/", "tests/", "docs/")) or "__pycache__" in n]
    assert package.stat().st_size < 8 * 2**20


@pytest.mark.long
def test_stopped_twice_with_a_token_on_a_head_without_cpus(runs: Path, whole: list[dict[str, float]]) -> None:
    """With Ray's own commands and with ours; the driver on the head, all actors on the worker node."""
    run, folder = [*TINY, "--name", "token", "--output_dir", str(runs)], runs / "token"
    with Head(num_cpus=0, token=True, worker_cpus=2) as head:
        secret, head.environment["RAY_AUTH_TOKEN_PATH"] = head.environment["RAY_AUTH_TOKEN_PATH"], ""
        head.environment |= {"RAY_AUTH_MODE": "disabled"}
        text = opdlm(head, "submit", *run, status=2)
        assert "RAY_AUTH_MODE=token" in text
        head.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": secret}

        submitted = head.command(
            RAY, "job", "submit", "--no-wait", "--address", head.address, "--working-dir", ".",
            "--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}', "--",
            "python", "-m", "deploy", "train", *run,
        )  # fmt: skip
        job = job_of(submitted.stdout)
        wait_for_batch(1, head, job, folder)
        stopped = head.command(RAY, "job", "stop", "--address", head.address, job)
        assert "was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
        first = saved_batches(folder)

        job = job_of(opdlm(head, "submit", *run, "--resume", "auto", "--no-wait"))
        wait_for_batch(first + 1, head, job, folder)
        assert f"{job}: STOPPED" in opdlm(head, "stop", job)
        assert f"{job} │ STOPPED │" in opdlm(head, "jobs")
        assert "has ended already" in opdlm(head, "stop", job)
        second = saved_batches(folder)
        assert 1 <= first < second < BATCHES

        text = opdlm(head, "submit", *run, "--resume", "auto")
        assert f"going on from batch-{second:06d}" in text and f"batch {BATCHES}/{BATCHES}" in text
    assert_same_run(folder, whole)
