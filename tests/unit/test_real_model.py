"""`make real`: which steps there are, which are skipped, and that their commands and its Makefile variables exist."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.main import get_command

from common.config.errors import ConfigError
from common.config.file import REPOSITORY, load_config
from deploy.cli import app
from deploy.demo import real_model
from deploy.demo.real_model import Options


@pytest.fixture
def commands(monkeypatch):
    """The commands that would run, which run nothing."""
    seen: list[list[str]] = []

    def keep(command):
        seen.append(command[3:])
        return 0

    monkeypatch.setattr(real_model, "status_of", keep)
    return seen


def names(commands: list[list[str]]) -> list[str]:
    return [command[0] for command in commands]


def values(command: list[str], option: str) -> list[str]:
    return [command[i + 1] for i, part in enumerate(command) if part == option]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(real_model.real_report, "write", lambda *_: None)


def test_every_command_is_one_of_opdlm_with_options_that_it_has(commands, tmp_path):
    for small in (False, True):
        real_model.run(real_model.steps(Options(tmp_path / "real", "some/model", small=small)))
    assert names(commands) == ["prompts", "train", "eval", "eval"] * 2
    known = get_command(app).commands
    for name, *arguments in commands:
        options = [a for a in arguments if a.startswith("--")]
        own = {o for parameter in known[name].params for o in [*parameter.opts, *parameter.secondary_opts]}
        fields = [o for o in options if o not in own]
        assert all("." in o or o == "--output_dir" for o in fields), fields
    for _, preset, *overrides in (c for c in commands if c[0] == "train"):
        without = overrides[: overrides.index("--resume")]
        config = load_config(preset, without)
        assert (config.model.path, config.output_dir) == ("some/model", tmp_path / "real")
    assert config.pipeline.max_batches == 3  # the small one, on two cores
    cpus = [config.rollout.resources, config.teacher.resources, config.learner.resources]
    assert (sum(r.cpus for r in cpus), sum(r.gpus for r in cpus)) == (2, 0)


def test_steps_whose_result_is_there_are_skipped(commands, tmp_path):
    folder = tmp_path / "real"
    for made in ("model", "smollm2-135m/checkpoints/final"):
        (folder / made).mkdir(parents=True)
    (folder / "prompts.parquet").touch()
    options = Options(folder, data=tmp_path / "data")
    real_model.run(real_model.steps(options))
    assert names(commands) == ["eval", "eval"]
    evaluated, long = commands
    assert values(evaluated, "--suite") == ["ifeval", "gsm8k"] and values(evaluated, "--suite-data") == [
        str(tmp_path / "data")
    ]
    assert values(evaluated, "--threshold") == ["0.9", "0.8", "0.7", "0.6"]
    assert values(evaluated, "--original") == [str(folder / "model")]
    assert (values(long, "--count"), values(long, "--max-new-tokens")) == (["200"], ["2000"])
    assert "--no-score" in long and "--no-score" not in evaluated
    for made in ("eval.json", "long.unscored.json.gz"):
        (folder / made).touch()
    real_model.run(real_model.steps(options))
    assert len(commands) == 2


def test_only_the_named_steps_run_and_all_but_the_report_need_the_model(commands, tmp_path):
    options = Options(tmp_path / "real")
    assert [step.name for step in real_model.steps(options, ["report"])] == ["report"]
    assert [step.name for step in real_model.steps(options, ["eval", "train"])] == ["model", "train", "eval"]
    for number in (20, 40):
        (options.run_dir / "checkpoints" / f"batch-{number:06d}").mkdir(parents=True)
    real_model.run(real_model.steps(Options(tmp_path / "real", "some/model"), ["checkpoints"]))
    assert [values(c, "--output") for c in commands] == [
        [str(tmp_path / "real" / "at" / f"batch-0000{n}.json")] for n in (20, 40)
    ]
    assert all(values(c, "--original") == ["none"] for c in commands)
    with pytest.raises(SystemExit, match="--steps: 'evaluate' is no step; choose from prompts, train"):
        real_model.main(["--folder", str(tmp_path), "--steps", "prompts,evaluate"])


def test_responses_that_cannot_be_checked_here_are_kept_and_scored_where_they_can(
    commands, monkeypatch, tmp_path, capsys
):
    options, output = Options(tmp_path / "real", "some/model"), tmp_path / "real" / "eval.unscored.json.gz"
    monkeypatch.setattr(real_model, "missing_packages", lambda: ["lm_eval"])
    real_model.run(real_model.steps(options, ["eval"]))
    assert "--no-score" in commands.pop()
    output.touch()
    real_model.run(real_model.steps(options, ["eval", "report"]))
    assert not commands  # generated, and not to be scored here
    assert f"{output} cannot be scored here (lm_eval not installed)" in capsys.readouterr().out
    monkeypatch.setattr(real_model, "missing_packages", lambda: [])
    real_model.run(real_model.steps(options, ["eval", "report"]))
    assert commands == [["score", str(output)]]


def test_a_command_that_fails_ends_it_with_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "status_of", lambda command: 2)
    with pytest.raises(SystemExit) as ended:
        real_model.run(real_model.steps(Options(tmp_path, "some/model")))
    assert ended.value.code == 2


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_stop_reaches_the_command_and_waits_for_its_checkpoint(tmp_path, sent):
    started, saved = tmp_path / "started", tmp_path / "saved"
    command = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""
    sequence = f"""
import sys
from deploy.demo.real_model import status_of
sys.exit(status_of([sys.executable, "-c", {command!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", sequence], cwd=REPOSITORY)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=30) == 143
    assert saved.exists()


def test_the_instructions_that_travel_with_the_code_can_be_asked_and_checked():
    pytest.importorskip("lm_eval")
    from deploy.evaluation.ifeval import followed

    rows = [json.loads(line) for line in real_model.INSTRUCTIONS.read_text().splitlines()]
    assert len(rows) == 6
    right = ["whales seals crabs", "the rain falls softly on the old roof of the house.", "memory and memory"]
    right += ["<<The Key>>", '"Good morning"', "* air\n* rest"]
    for row, response in zip(rows, right, strict=True):
        assert followed(row, response)[0] == [True] * len(row["instruction_id_list"]), row
        assert not all(followed(row, "WHY, oh why")[0]), row


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(real_model, "PACKAGE", "no_such_model")
    with pytest.raises(ConfigError, match=r"no-such-model is not installed; .*make real MODEL=FOLDER"):
        real_model.packaged_gguf()


def test_the_makefile_knows_what_the_page_says():
    makefile = (REPOSITORY / "Makefile").read_text()
    page = (REPOSITORY / "docs" / "real-model.md").read_text()
    assert re.search(r"^real:", makefile, flags=re.MULTILINE)
    for variable in set(re.findall(r"\b(MODEL|PROMPTS|DATA|REAL|REAL_EXTRA)=", page)):
        assert re.search(rf"^{variable} \?=", makefile, flags=re.MULTILINE)
    assert real_model.PACKAGE.replace("_", "-") in makefile
