"""The command line as a newcomer meets it: help, errors without traceback, statuses, and the small commands."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.config.errors import ConfigError
from common.config.file import REPOSITORY, load_config
from common.config.run import RunConfig
from common.config.unmasking import (
    AdaptiveUnmasking,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
)
from deploy import cli, pipeline
from deploy.commands.fields import rows
from deploy.commands.train import train
from deploy.errors import WorkerError
from deploy.evaluation.decoding_options import unmasking_of
from tests.models import tiny_qwen3

HELDOUT = str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")


COMMANDS = [info.name or info.callback.__name__ for info in cli.app.registered_commands]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "lm_eval"])  # it shows the help of lm_eval itself
def test_every_command_has_help(opdlm, command):
    status, out, _ = opdlm(command, "--help")
    assert status == 0
    assert f"opdlm {command}" in out


def test_options_are_in_lower_case(opdlm):
    """A version of typer takes an option's name from its metavar."""
    for command in (c for c in COMMANDS if c != "lm_eval"):
        shouted = [o for o in re.findall(r"--[A-Z][A-Z_-]*", opdlm(command, "--help")[1]) if o != "--FIELD"]
        assert not shouted, (command, shouted)


def test_help_of_all_commands_loads_no_heavy_library():
    code = f"""
import sys
from typer.testing import CliRunner
from deploy import cli
for command in {[c for c in COMMANDS if c != "lm_eval"]}:
    assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0, command
heavy = {{"torch", "ray", "transformers", "deepspeed", "vllm", "scipy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_of_a_command_is_registered():
    modules = [f"deploy.commands.{file.stem}" for file in (REPOSITORY / "deploy/commands").glob("*.py")]
    commands = {name for name in modules if hasattr(importlib.import_module(name), "register")}
    assert {info.callback.__module__ for info in cli.app.registered_commands} == commands


def test_help_lists_commands_and_train_help_explains_overrides(opdlm):
    assert "make-tiny-arlm" in opdlm("--help")[1]
    out = opdlm("train", "--help")[1]
    for part in ("opdlm train tiny --name mine", "--FIELD VALUE", "--learner.lr", "opdlm fields", "qwen3-8b"):
        assert part in out


def test_examples_in_the_help_are_valid():
    text = train.__doc__ or ""
    examples = [line.split()[2:] for line in text.splitlines() if line.strip().startswith("opdlm train ")]
    assert len(examples) >= 4
    for source, *overrides in examples:
        preset = "tiny" if source == "my.yaml" else source
        load_config(preset, [o for o in overrides if o != "--dry-run"])


def test_most_used_fields_in_the_help_exist():
    known = {field for field, *_ in rows(RunConfig, "")}
    named = re.findall(r"--([\w.]+)", (train.__doc__ or "").split("The most used:")[1])
    assert len(named) >= 11
    assert set(named) <= known


def test_fields_table_names_every_field(opdlm):
    out = opdlm("fields")[1]
    for part in ("learner.lr", "1e-05", "rollout.unmasking.rule", "objective.divergence.alpha", "required"):
        assert part in out


def test_dry_run_starts_nothing(opdlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = opdlm("train", "tiny", "--dry-run", "--learner.lr", "3e-4")
    assert status == 0
    for part in ("lr: 0.0003", "rollout-1", "learner-1", "rollout batches"):
        assert part in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "tinny"], "did you mean 'tiny'?"),
        (["train", "tiny", "--learner.lrr", "1"], "did you mean learner.lr?"),
        (["train", "tiny", "--learner.betas", "[1, [x]]"], "learner.betas"),
        (["train", "tiny", "--model.path", "./nope", "--output_dir", "OUT"], "model.path: folder './nope'"),
        (["train", "tiny", "--data.prompts", "./nope", "--output_dir", "OUT"], "data.prompts: 'nope' does not"),
        (["generate", "nope"], "no prompt"),
        (["generate", "nope", "hello"], "MODEL: folder 'nope' does not exist"),
        (["eval", "nope", "--problems", HELDOUT], "MODEL: folder 'nope' does not exist"),
        (["eval", "ARLM", "--problems", HELDOUT], "convert it first: opdlm convert"),
        (["eval", "ARLM", "--problems", HELDOUT, "--rule", "static", "--threshold", "0.8"], "add --rule dynamic"),
        (["eval", "ARLM", "--problems", HELDOUT, "--output", "nowhere/x.json"], "in a folder that exists"),
        (["eval", "ARLM", "--problems", HELDOUT, "--output", "OUT"], "must be a .json file"),
        (["eval", "ARLM", "--problems", HELDOUT, "--autoregressive", "--rule", "static"], "--rule: has no meaning"),
        (["eval", "ARLM", "--problems", HELDOUT, "--autoregressive", "--max-new-tokens", "500"], "512 positions"),
        (["generate", "ARLM", "x", "--file", HELDOUT], "no prompt or two"),
        (["generate", "ARLM", "x", "--output", "OUT"], "must be a .jsonl file"),
        (["eval", "ARLM", "--problems", "nope.jsonl", "--autoregressive"], "--problems: 'nope.jsonl' does not exist"),
        (["convert", "nope", "OUT/new"], "MODEL: folder 'nope' does not exist"),
        (["convert", "ARLM", "ARLM"], "exists; choose another folder"),
        (["export", "nope", "OUT/new"], "MODEL: folder 'nope' does not exist"),
        (["export", "ARLM", "OUT/new"], "convert it first: opdlm convert"),
        (["export", "ARLM", "ARLM"], "exists; choose another folder"),
        (["generate", "ARLM", "x", "--rule", "best"], "'best' is not one of"),
        (["generate", "ARLM", "x", "--threshold", "2"], "--threshold"),
        (["generate", "ARLM", "--file", "nope.txt"], "does not exist"),
        (["generate", "ARLM", "x", "--output", "/proc/x.jsonl"], "--output: cannot write in '/proc'"),
        (["eval", "ARLM", "--problems", HELDOUT, "--plot", "/proc/x.png"], "--plot: cannot write in '/proc'"),
        (["convert", "ARLM", "/proc/student"], "OUT: cannot write in '/proc/student'"),
        (["make-tiny-arlm", "--out", "/proc/x"], "--out: cannot write in '/proc/x'"),
        (["respond", "tiny", "--output", "/proc/x.parquet"], "--output: cannot write in '/proc'"),
        (["train", "tiny", "--output_dir", "/proc/x"], "output_dir: cannot write in '/proc/x/tiny'"),
        (["train", "tiny", "--output_dir", "OUT", "--cache_dir", "/proc/x"], "cache_dir: cannot write in '/proc/x'"),
        (["jobs", "--address", "nonsense"], "--address: 'nonsense' is no address"),
        (["submit", "tiny", "--working-dir", "nope"], "'nope' does not exist"),
    ],
)
def test_bad_input_ends_with_status_two_and_a_remedy(opdlm, tmp_path, arguments, said):
    places = {"ARLM": str(REPOSITORY / "deploy/models/tiny-arlm"), "OUT": str(tmp_path), "OUT/new": f"{tmp_path}/new"}
    status, out, err = opdlm(*[places.get(a, a) for a in arguments])
    assert (status, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_a_model_that_cannot_be_loaded_is_named_by_its_option(opdlm, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(REPOSITORY / "deploy/models/tiny-arlm", broken)
    (broken / "tokenizer.json").write_text("{")
    for command in (["convert", broken, tmp_path / "out"], ["eval", broken, "--problems", HELDOUT, "--autoregressive"]):
        status, _, err = opdlm(*command)
        assert status == 2
        assert err.startswith(f"error: MODEL: '{broken}' has a tokenizer that cannot be read")
        assert len(err.splitlines()) == 1


@pytest.mark.long
def test_a_task_that_lm_eval_does_not_know_is_refused_in_one_sentence(opdlm):
    pytest.importorskip("lm_eval")
    status, _, err = opdlm("lm_eval", "--model", "opdlm", "--model_args", "pretrained=x", "--tasks", "no_such_task")
    assert status == 2
    assert err.splitlines()[-1].startswith("error: lm_eval: Tasks not found: no_such_task; see its options")
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_sentence(opdlm, tmp_path, monkeypatch):
    full = tmp_path / "results.json"
    full.symlink_to("/dev/full")
    arguments = ["--problems", HELDOUT, "--count", 1, "--max-new-tokens", 4, "--autoregressive", "--output", full]
    status, _, err = opdlm("eval", REPOSITORY / "deploy/models/tiny-arlm", *arguments)
    reason = "could not be written (No space left on device); free space, or write to another place"
    assert (status, err.splitlines()[-1]) == (2, f"error: --output: '{full}' {reason}")  # behind a bar of the loading

    def log(*_: Any) -> None:  # as a run does that writes its metrics
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr(pipeline, "run", log)
    status, _, err = opdlm("train", "tiny", "--output_dir", tmp_path)
    assert (status, err) == (2, "error: No space left on device; free space, or write to another disk\n")


def test_a_file_that_cannot_be_opened_is_named(opdlm, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_: (tmp_path / "file" / "x").read_text())
    (tmp_path / "file").write_text("")
    status, _, err = opdlm("train", "tiny", "--output_dir", tmp_path)
    assert status == 2
    assert err.startswith(f"error: '{tmp_path}/file/x': Not a directory; name another file or folder")


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), ValueError("ours"), ConnectionRefusedError("ours")])
def test_our_own_errors_keep_their_traceback(monkeypatch, tmp_path, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    monkeypatch.setattr(sys, "argv", ["opdlm", "train", "tiny", "--output_dir", str(tmp_path)])
    with pytest.raises(type(error), match="ours"):
        cli.main()


def test_a_failed_run_ends_with_status_one_and_its_cause(opdlm, monkeypatch):
    def fail(*_: Any) -> dict[str, Any]:
        raise WorkerError("learner-1 died while training: [/rank1] unbalanced [bold]markup[/x]")

    monkeypatch.setattr(pipeline, "run", fail)
    status, _, err = opdlm("train", "tiny")
    assert status == 1
    assert err.strip() == "run failed: learner-1 died while training: [/rank1] unbalanced [bold]markup[/x]"


def test_summary_of_a_run_is_printed(opdlm, monkeypatch):
    half = {"exact_match": 0.5, "tokens_per_step": 2.25}
    summary = {"teacher": half, "student_init": half, "student": {"static": half, "dynamic": half}}
    monkeypatch.setattr(pipeline, "run", lambda *_: summary)
    out = opdlm("train", "tiny")[1]
    assert out.count("50.0%") == 4
    assert out.count("2.25") == 4
    assert "opdlm generate runs/tiny/checkpoints/final" in out
    monkeypatch.setattr(pipeline, "run", lambda *_: {"train": {}})
    assert "everything is in runs/tiny" in opdlm("train", "tiny")[1]


def test_rules_of_the_command_line():
    assert unmasking_of("dynamic", 0.8) == DynamicUnmasking(threshold=0.8)
    assert unmasking_of("static", 0.8) == StaticUnmasking()
    assert unmasking_of("sequential", 0.8) == SequentialUnmasking()
    assert unmasking_of("entropy_bound", 0.8) == EntropyBoundUnmasking()
    assert unmasking_of("adaptive", 0.8, 0.5) == AdaptiveUnmasking(lower=0.5, upper=0.8)
    with pytest.raises(ConfigError, match=r"--lower: 0\.9 is above --threshold 0\.8; choose a value of at most 0\.8"):
        unmasking_of("adaptive", 0.8, 0.9)


def test_convert_then_generate_then_eval(opdlm, tmp_path):
    student = tmp_path / "student"
    assert opdlm("convert", tiny_qwen3(tmp_path / "arlm"), student, "--block-size", 8)[0] == 0
    saved = json.loads((student / "config.json").read_text())
    assert (saved["block_size"], saved["mask_token_id"]) == (8, 259)

    status, out, _ = opdlm("generate", student, "2 + 2?", "--max-new-tokens", 8, "--rule", "static")
    assert status == 0
    tokens, cut, steps = map(int, re.findall(r"(\d+) tokens(?: and (\d+) that were cut)? in (\d+) steps", out)[0])
    assert (tokens, tokens + cut) == (8, steps)  # static: one token a step
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[red]1 + 1?\n\n2 + 2?\n")
    out = opdlm("generate", student, "--file", prompts, "--max-new-tokens", 8, "--raw")[1]
    assert "[red]1 + 1?" in out
    assert out.count("per step") == 2

    for arguments, said in ((["x" * 600], "1 after"), (["hello", "--max-new-tokens", 600], "600 after")):
        status, _, err = opdlm("generate", student, *arguments)
        assert status == 2
        assert f"--max-new-tokens: {said} the longest prompt" in err and "512 positions at block size 8" in err

    few = ("--problems", HELDOUT, "--count", 2, "--max-new-tokens", 8)
    status, out, err = opdlm("eval", student, *few)
    assert (status, "static 1" in out and "dynamic 0.9" in out) == (0, True)
    assert "word_problems_heldout, dynamic 0.9: 2 responses" in err
    assert "exact_match" in opdlm("eval", student, *few, "--rule", "static")[1]


def test_generate_reads_and_writes_records_and_shows_steps(opdlm, tmp_path):
    student = tmp_path / "student"
    opdlm("convert", tiny_qwen3(tmp_path / "arlm"), student, "--block-size", 4)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"question": "1 + 1?", "id": 7}\n{"question": "2 + 2?", "id": 8}\n')
    arguments = ["--max-new-tokens", 8, "--rule", "static"]
    status, out, _ = opdlm("generate", student, "--file", prompts, "--output", answers, *arguments)
    assert (status, "per step" in out) == (0, False)
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(w["question"], w["id"]) for w in written] == [("1 + 1?", 7), ("2 + 2?", 8)]
    assert {"response", "response_tokens", "denoise_forwards", "commit_forwards", "finish_reason"} <= set(written[0])

    out = opdlm("generate", student, "2 + 2?", "--show-steps", *arguments)[1]
    assert "round 0:" in out
    assert out.count("░") >= 8  # one token a step: most positions wait
    assert "\x1b" not in out

    for file, field, said in (
        (prompts, "missing", "no text in field 'missing'"),
        (answers, "question", "'response' already"),
    ):
        status, _, err = opdlm("generate", student, "--file", file, "--question-field", field)
        assert (status, said in err) == (2, True)


def test_the_shipped_arlm_solves_problems_autoregressively(opdlm):
    arlm = REPOSITORY / "deploy/models/tiny-arlm"
    arguments = ["--problems", HELDOUT, "--count", 10, "--max-new-tokens", 72, "--autoregressive"]
    metrics = dict(line.split() for line in opdlm("eval", arlm, *arguments)[1].splitlines())
    assert float(metrics["exact_match"]) >= 0.9
    assert float(metrics["tokens_per_step"]) == 1


def test_make_tiny_arlm_passes_its_options_on(monkeypatch, tmp_path):
    calls: list[tuple[Path, dict[str, int]]] = []
    monkeypatch.setattr(
        "deploy.demo.tiny_arlm.make_tiny_arlm", lambda out, **o: calls.append((out, o)) or {"exact_match": 1}
    )
    result = CliRunner().invoke(cli.app, ["make-tiny-arlm", "--out", str(tmp_path), "--seed", "3", "--steps", "5"])
    assert result.exit_code == 0
    assert calls == [(tmp_path, {"seed": 3, "threads": 1, "steps": 5})]


def test_python_dash_m_deploy_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "deploy", "train", "tinny"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no config 'tinny'")
