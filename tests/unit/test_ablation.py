"""Ablations: all configs are checked before the first run, finished runs are not repeated, verdicts follow metrics."""

import io
import json
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import cli
from deploy.ablation.config import AblationConfig, Claim
from deploy.ablation.processes import Processes
from deploy.ablation.progress import runs_table, standing
from deploy.ablation.report import Result, holm, plot_curves, verdicts, write_report
from deploy.ablation.runs import (
    _respond,
    _responses_made_with,
    _write_config,
    arms_named,
    arms_of,
    check_runs,
    load_ablation,
    run_all,
)
from deploy.errors import Stopped, WorkerError
from deploy.preflight import identity
from deploy.run_lock import RunLock

RUN = Processes.run


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    """A mistake here must not train for minutes."""

    def run(self, arguments, log):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(Processes, "run", run)


def ablation(tmp_path, **changes) -> AblationConfig:
    fields = {
        "name": "small",
        "base": "tiny",
        "output_dir": tmp_path / "runs",
        "report": tmp_path / "evidence.md",
        "seeds": [0, 1, 2],
        "arms": {"OPDLM": {"objective.method": "opdlm"}, "SFT": {"objective.method": "sft"}},
        "claims": [{"text": "on-policy wins", "better": "OPDLM", "worse": "SFT", "metric": "dynamic"}],
    }
    return AblationConfig.model_validate({**fields, **changes})


def finish(arm, static: float, dynamic: float) -> None:
    folder = arm.config.run_dir
    folder.mkdir(parents=True)
    student = {name: {"exact_match": value, "tokens_per_step": 2.0, "problems": 200}
               for name, value in (("static", static), ("dynamic", dynamic))}  # fmt: skip
    summary = {
        "student": student,
        "train": {"response_tokens": 1000, "updates": 8, "seconds": 60.0},
        "versions": {"python": "3.12.3", "torch": "2.11.0"},
        **identity(arm.config),
    }
    _write_config(arm.config, folder)
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"response_tokens": 500 * (i + 1), "eval/exact_match": dynamic * (i + 1) / 2} for i in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"response_tokens": 1200}]))


def test_the_shipped_ablation_has_all_arms_on_the_same_prompts():
    shipped = load_ablation("ablation")
    runs = arms_of(shipped)
    assert len(runs) == len(shipped.arms) * 3 == 24
    assert [arm.seed for arm in runs[:8]] == [0] * 8  # seed by seed
    for arm in runs:
        base = next(r for r in runs if r.seed == arm.seed).config
        assert arm.config.data == base.data
        assert arm.config.pipeline == base.pipeline
        assert arm.config.learner == base.learner
        assert arm.config.seed == arm.seed


def test_the_old_name_of_a_claims_metric_is_refused_with_the_new_one(tmp_path):
    fields = ablation(tmp_path).model_dump(mode="json")
    fields["claims"][0]["figure"] = fields["claims"][0].pop("metric")
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=r"^claims\.figure is now claims\.metric; write that$"):
        load_ablation(str(file))


def test_bad_arms_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"learner\.lrr"):
        arms_of(ablation(tmp_path, arms={"OPDLM": {"learner.lrr": 1}, "SFT": {}}))
    with pytest.raises(ValueError, match="names arm 'SFT'"):
        ablation(tmp_path, arms={"OPDLM": {}})
    with pytest.raises(ConfigError, match="same folder"):
        arms_of(ablation(tmp_path, arms={"OPDLM": {}, "SFT": {}, "SFT!": {}}))
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"name": "x", "base": "tiny", "armz": {}}))
    with pytest.raises(ConfigError, match=r"armz: unknown field .*; did you mean arms?"):
        load_ablation(str(tmp_path / "bad.yaml"))
    with pytest.raises(ConfigError, match="'tiny' is a run, not an ablation; start it with: opdlm train tiny"):
        load_ablation("tiny")
    (tmp_path / "bad.yaml").write_text("name: x\nbase: {{ BASE }}\n")
    with pytest.raises(ConfigError, match=r"line 2: not valid YAML: {{ ... }} is a placeholder"):
        load_ablation(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("{name: x, arms: {a: {}}}")
    with pytest.raises(ConfigError, match=r"base: missing; set base in the config$"):
        load_ablation(str(tmp_path / "bad.yaml"))


def test_finished_runs_are_not_made_again(tmp_path):
    settings = ablation(tmp_path)
    runs = arms_of(settings)
    for arm in runs:
        finish(arm, 0.9, 0.8)
    calls = []
    run_all(runs, calls.append, calls.append)
    assert not calls
    assert not runs[1].responses.exists()


def test_an_edited_arm_is_refused_by_name_with_the_fields_that_differ(tmp_path):
    for arm in arms_of(ablation(tmp_path)):
        finish(arm, 0.9, 0.8)
    edited = {"OPDLM": {"objective.method": "opdlm"}, "SFT": {"objective.method": "sft", "learner.lr": 3e-4}}
    settings = ablation(tmp_path, arms=edited)
    runs = arms_of(settings)
    assert [(arm.name, arm.done) for arm in runs] == [("OPDLM", True), ("SFT", False)] * 3
    with pytest.raises(ConfigError) as refused:
        check_runs(settings, runs)
    assert str(refused.value) == (
        "arms: 'SFT' with seed 0 was run with another config: learner.lr was 0.0006 and is 0.0003. Remove "
        f"{str(tmp_path / 'runs/small/SFT-seed0')!r}, or rename the arm; the same holds for 2 more"
    )
    write_report(settings, runs, "small.yaml")
    assert "3 of 6 runs" in settings.report.read_text()
    assert "| SFT |" not in settings.report.read_text()


def test_other_evaluations_are_refused_and_another_operation_is_the_same_run(tmp_path):
    for arm in arms_of(ablation(tmp_path)):
        finish(arm, 0.9, 0.8)
    settings = ablation(tmp_path, overrides={"evaluation.count": 50})
    assert not any(arm.done for arm in arms_of(settings))
    with pytest.raises(
        ConfigError, match=r"evaluation\.count was 200 and is 50\. Remove .*; the same holds for 5 more"
    ):
        check_runs(settings, arms_of(settings))
    settings = ablation(tmp_path, overrides={"data.prompts": "other.jsonl"})
    with pytest.raises(ConfigError, match=r"data\.prompts was '.*train\.jsonl' and is 'other.jsonl'"):
        check_runs(settings, arms_of(settings))
    settings = ablation(tmp_path, overrides={"pipeline.stage_timeout_s": 50})
    assert all(arm.done for arm in arms_of(settings))
    check_runs(settings, arms_of(settings))


def test_a_report_only_says_which_runs_it_leaves_out(tmp_path):
    settings = ablation(tmp_path, overrides={"learner.lr": 3e-4}, seeds=[0])
    for arm, old in zip(arms_of(settings), arms_of(ablation(tmp_path, seeds=[0])), strict=True):
        finish(old if arm.name == "SFT" else arm, 0.9, 0.8)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    result = CliRunner().invoke(cli.app, ["ablate", str(file), "--report-only"])
    assert "1 of 2 runs are finished" in result.output
    assert "left out: SFT, seed 0, whose run had another config: learner.lr was 0.0006 and is 0.0003" in result.output
    with pytest.raises(ConfigError, match="'SFT' with seed 0 was run with another config"):
        CliRunner().invoke(cli.app, ["ablate", str(file)], catch_exceptions=False)


def test_responses_of_another_config_are_refused(tmp_path, monkeypatch):
    settings = ablation(tmp_path)
    runs = arms_of(settings)
    monkeypatch.setattr(Processes, "run", lambda *_: runs[1].responses.write_bytes(b"made"))
    _respond(runs[1], lambda text: None, Processes())
    finish(runs[1], 0.9, 0.8)
    check_runs(settings, runs)
    edited = ablation(tmp_path, respond={"temperature": 0.5}, overrides={"data.limit": 100})
    with pytest.raises(ConfigError) as refused:
        check_runs(edited, [arm for arm in arms_of(edited) if arm.seed == 1])  # nothing of these was run
    assert "respond.temperature was 1.0 and is 0.5; seed was 0 and is 1; data.limit was None and is 100" in str(
        refused.value
    )
    again = ablation(tmp_path, respond={"samples": 2})
    with pytest.raises(ConfigError, match=rf"respond: .*Remove it, and with it what was trained on it: {tmp_path}"):
        check_runs(again, arms_of(again))


def test_an_arm_may_have_responses_of_its_own(tmp_path, monkeypatch):
    brts = {"objective.method": "sft", "respond": {"samples": 2, "keep": "best", "top_p": 0.95}}
    settings = ablation(tmp_path, seeds=[0], arms={"SFT": {"objective.method": "sft"}, "BRTS": brts}, claims=[])
    runs = arms_of(settings)
    assert [arm.responses.name for arm in runs] == ["responses.parquet", "responses-BRTS.parquet"]
    commands = []

    def run(self, arguments, log):
        commands.append(arguments)
        if arguments[0] == "respond":
            (tmp_path / "runs" / "small").joinpath(arguments[3].rpartition("/")[2]).write_bytes(b"made")

    monkeypatch.setattr(Processes, "run", run)
    run_all(runs, lambda text: None, lambda arm: None)
    made = [c for c in commands if c[0] == "respond"]
    assert [c[3] for c in made] == [str(arm.responses) for arm in runs]
    options = ["--temperature", "1.0", "--top-p", "0.95", "--samples", "2", "--keep", "best"]
    assert made[1][4:] == options and made[0][4:] == ["--temperature", "1.0", "--top-p", "1.0", "--samples", "1",
                                                      "--keep", "all"]  # fmt: skip
    check_runs(settings, runs)
    changed = ablation(tmp_path, seeds=[0], arms={"BRTS": {**brts, "respond": {"keep": "best"}}}, claims=[])
    with pytest.raises(ConfigError, match=r"respond\.top_p was 0\.95 and is 1\.0; respond\.samples was 2 and is 1"):
        check_runs(changed, arms_of(changed))


def test_responses_that_an_earlier_release_recorded_are_taken(tmp_path):
    """Its record knows neither top_p nor keep."""
    settings = ablation(tmp_path, seeds=[0])
    arm = arms_of(settings)[1]
    old = _responses_made_with(arm)
    record = arm.responses.with_suffix("") / "made_with.json"
    record.parent.mkdir(parents=True)
    arm.responses.write_bytes(b"made")
    record.write_text(json.dumps({k: v for k, v in old.items() if k not in ("respond.top_p", "respond.keep")}))
    check_runs(settings, arms_of(settings))


def results(better: list[float], worse: list[float]) -> list[Result]:
    def result(arm: str, seed: int, value: float) -> Result:
        metrics = {"exact_match": value}
        return Result(arm, seed, {"exact_match": 0.9}, metrics, {}, {}, [], value, value)

    return [result("a", i, v) for i, v in enumerate(better)] + [result("b", i, v) for i, v in enumerate(worse)]


@pytest.mark.parametrize(
    ("better", "worse", "metric", "expected"),
    [
        ([0.80, 0.82, 0.81], [0.60, 0.61, 0.62], "dynamic", "reproduces"),
        ([0.60, 0.61, 0.62], [0.80, 0.82, 0.81], "dynamic", "contradicted"),
        ([0.80, 0.60, 0.70], [0.60, 0.75, 0.60], "dynamic", "in its direction, not significant"),
        ([0.60, 0.75, 0.60], [0.80, 0.60, 0.70], "dynamic", "not seen"),
        ([0.88, 0.89, 0.88], [0.70, 0.72, 0.71], "loss", "reproduces"),
        ([0.80], [0.60], "dynamic", "open"),
        ([0.80, 0.82, 0.81], [0.60, 0.61, 0.62], "held_out_accepted", "reproduces"),
        ([0.80, 0.82, 0.81], [0.60, 0.61, 0.62], "held_out_kl", "contradicted"),
    ],
)
def test_verdicts(better, worse, metric, expected):
    claim = Claim(text="", better="a", worse="b", metric=metric)
    (found,) = verdicts(results(better, worse), [claim])
    mean, std, p = found.mean, found.std, found.p
    assert found.word == expected
    assert found.seeds == len(better)
    if found.seeds > 1:  # the paired t statistic, written out
        sign = -1 if metric in ("loss", "held_out_kl") else 1
        values = 0.9 - np.array(better) if metric == "loss" else np.array(better)
        others = 0.9 - np.array(worse) if metric == "loss" else np.array(worse)
        difference = sign * (values - others)
        assert mean == pytest.approx(difference.mean())
        assert std == pytest.approx(difference.std(ddof=1))
        t = mean / (std / np.sqrt(3))
        # Student's t with two degrees of freedom has a closed form
        assert p == pytest.approx(1 - abs(t) / np.sqrt(2 + t**2), abs=1e-9)


def test_verdicts_are_corrected_for_the_number_of_claims():
    """Against p-values adjusted by hand; what is significant alone is not beside four others."""
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    claim = Claim(text="", better="a", worse="b", metric="dynamic")
    rows = results([0.80, 0.83, 0.81], [0.70, 0.71, 0.74])
    (alone,) = verdicts(rows, [claim])
    assert alone.word == "reproduces" and 0.01 < alone.p == alone.corrected < 0.05
    beside = verdicts(rows, [claim] * 5)
    assert {v.word for v in beside} == {"in its direction, not significant"}
    assert beside[0].corrected == pytest.approx(5 * alone.p)


def test_an_ablation_without_problems_reports_the_held_out_kl(tmp_path):
    """Lower is better; an arm may have fewer seeds than the others."""
    arms = {"OPDLM": {"objective.method": "opdlm"}, "SFT": {"objective.method": "sft"}, "LIFT": {"seeds": [1]}}
    claims = [{"text": "a lower KL", "better": "OPDLM", "worse": "SFT", "metric": "held_out_kl"}]
    overrides = {"evaluation.problems": None, "evaluation.held_out_prompts": 16}
    settings = ablation(tmp_path, arms=arms, claims=claims, overrides=overrides)
    runs = arms_of(settings)
    assert [(arm.name, arm.seed) for arm in runs if arm.name == "LIFT"] == [("LIFT", 1)]
    for arm in runs:
        finish(arm, 0.9, 0.8)
        summary = json.loads((arm.config.run_dir / "summary.json").read_text())
        del summary["student"]
        mean = {"OPDLM": 1.0, "SFT": 1.5, "LIFT": 2.0}[arm.name] + arm.seed / 100 * (1 + (arm.name == "SFT"))
        summary["held_out_kl"] = {"mean": mean}
        (arm.config.run_dir / "summary.json").write_text(json.dumps(summary))
        (arm.config.run_dir / "metrics.jsonl").write_text('{"response_tokens": 500, "eval/held_out_kl": 3.0}\n')
    write_report(settings, runs, "small.yaml")
    text = settings.report.read_text()
    assert "| arm | seeds | held-out KL, nats | training tokens |" in text
    assert "| OPDLM | 3 | 1.010 ± 0.010 |" in text and "| LIFT | 1 | 2.010 |" in text
    assert (
        "| a lower KL | held-out KL: OPDLM against SFT | +0.510 ± 0.010 nats | 0.000 | 0.000 | 3 | **reproduces** |"
        in text
    )
    assert "responses to 16 held-out prompts" in text and "![Held-out KL at the end]" in text
    with pytest.raises(ValueError, match=r"arm 'LIFT' has seed 7, which is none of seeds \[0, 1, 2\]; add it there"):
        ablation(tmp_path, arms=arms | {"LIFT": {"seeds": [7]}})


def test_the_report_of_an_unfinished_ablation(tmp_path):
    settings = ablation(tmp_path)
    runs = arms_of(settings)
    for arm in runs[:5]:
        finish(arm, 0.9, 0.8 if arm.name == "OPDLM" else 0.5)
    write_report(settings, runs, "small.yaml")
    text = settings.report.read_text()
    assert "5 of 6 runs" in text
    assert "| OPDLM | 3 | 90.0 | 80.0 | 10.0 |" in text
    assert "| on-policy wins |" in text
    stored = json.loads((tmp_path / "benchmarks" / "small.json").read_text())
    assert [(r["arm"], r["seed"]) for r in stored] == [(arm.name, arm.seed) for arm in runs[:5]]
    assert stored[0]["curve"] == [[500, 0.4], [1000, 0.8]]
    assert "- python 3.12.3, torch 2.11.0: seeds 0, 1, 2" in text
    assert (tmp_path / "images" / "small-curves.png").stat().st_size > 10_000
    assert (tmp_path / "images" / "small-final.png").stat().st_size > 5_000


def test_a_failed_run_is_named_and_stops_those_that_have_not_started(tmp_path, monkeypatch):
    settings = ablation(tmp_path)
    runs = arms_of(settings)
    started = []

    def train(arm, *_):
        started.append(arm)
        if len(started) == 2:
            raise WorkerError("rollout-0 died")
        time.sleep(0.5 if len(started) > 2 else 0)  # long enough for the others to be cancelled
        finish(arm, 0.9, 0.8)

    monkeypatch.setattr("deploy.ablation.runs._respond", lambda *_: None)
    monkeypatch.setattr("deploy.ablation.runs._train", train)
    with pytest.raises(WorkerError, match="rollout-0 died"):
        run_all(runs, lambda text: None, lambda arm: None)
    assert len(started) < len(runs)
    done, before = [], sum(arm.done for arm in runs)
    run_all(runs, lambda text: None, done.append, jobs=3)
    assert before >= 1 and len(done) == len(runs) - before and all(arm.done for arm in runs)


def test_other_runs_may_go_on_where_one_fails(tmp_path, monkeypatch):
    runs = arms_of(ablation(tmp_path))

    def train(arm, *_):
        if arm.name == "SFT":
            raise WorkerError(f"seed {arm.seed} failed")
        finish(arm, 0.9, 0.8)

    monkeypatch.setattr("deploy.ablation.runs._respond", lambda *_: None)
    monkeypatch.setattr("deploy.ablation.runs._train", train)
    with pytest.raises(WorkerError, match=r"seed \d failed; 2 more failed"):
        run_all(runs, lambda text: None, lambda arm: None, keep_going=True)
    assert [arm.done for arm in runs] == [True, False] * 3


_STUB = """
import json, pathlib, signal, sys, time
def stop(number, frame):
    path.write_text("stopped")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
path = pathlib.Path(sys.argv[1])
path.write_text("begun")
time.sleep(30)
"""


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    """Real processes in place of `opdlm train`: each runs for half a minute, and a SIGTERM ends it in its own way."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "__main__.py").write_text(_STUB)
    monkeypatch.setattr("deploy.ablation.processes.child_environment", lambda: {"PYTHONPATH": str(tmp_path)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Processes, "run", RUN)
    monkeypatch.setattr("deploy.ablation.runs._respond", lambda *_: None)

    def train(arm, runs, processes):
        processes.run([str(tmp_path / f"{arm.name}{arm.seed}")], tmp_path / "log")

    monkeypatch.setattr("deploy.ablation.runs._train", train)
    return tmp_path


def test_a_spent_time_stops_the_runs_in_progress_and_begins_no_more(stubborn):
    begin = time.monotonic()
    run_all(arms_of(ablation(stubborn)), lambda text: None, lambda arm: None, jobs=2, stop_after_s=1.5)
    assert time.monotonic() - begin < 15
    assert {file.name: file.read_text() for file in stubborn.glob("*[0-9]")} == {"OPDLM0": "stopped", "SFT0": "stopped"}


def test_a_signal_reaches_the_runs_in_progress(stubborn):
    def signal_when_begun() -> None:
        while not (stubborn / "OPDLM0").exists():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=signal_when_begun)
    thread.start()
    with pytest.raises(Stopped, match=r"^0 of 6 runs are finished; to go on, repeat the command$") as stopped:
        run_all(arms_of(ablation(stubborn)), lambda text: None, lambda arm: None)
    thread.join()
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert (stubborn / "OPDLM0").read_text() == "stopped" and not (stubborn / "SFT0").exists()


def test_arms_are_chosen_by_name_and_use_the_responses_of_all(tmp_path, monkeypatch):
    """Those of the first seed, even where the arm that is chosen has another."""
    arms = {"OPDLM": {}, "a": {"objective.method": "sft"}, "b, jumped to": {"objective.method": "sft", "seeds": [1]}}
    settings = ablation(tmp_path, arms=arms, claims=[], seeds=[0, 1])
    assert arms_named(settings, "b-jumped-to, OPDLM") == ["OPDLM", "b, jumped to"]
    with pytest.raises(ConfigError, match=r"^--arms: 'b' is no arm; choose from OPDLM, a, b-jumped-to$"):
        arms_named(settings, "b, jumped to")
    runs = arms_of(settings)
    started = []

    def run(self, arguments, log):
        started.append(arguments)
        if arguments[0] == "respond":
            runs[0].responses.write_bytes(b"made")

    monkeypatch.setattr(Processes, "run", run)
    (chosen,) = [arm for arm in runs if arm.name == "b, jumped to"]
    run_all(runs, lambda text: None, lambda arm: None, chosen=[chosen])
    assert [arguments[0] for arguments in started] == ["respond", "train"]
    assert load_config(started[0][1]).seed == 0 and load_config(started[1][1]).seed == 1
    check_runs(settings, runs)


def test_runs_that_need_no_responses_go_on_while_these_are_made(tmp_path, monkeypatch):
    arms = {"SFT": {"objective.method": "sft"}, "OPDLM": {}}
    runs = arms_of(ablation(tmp_path, arms=arms, claims=[], seeds=[0, 1]))
    order, trained = [], threading.Event()

    def run(self, arguments, log):
        if arguments[0] == "respond":
            assert trained.wait(20)  # no run that needs them, and none of the next seed, is before it
            runs[0].responses.write_bytes(b"made")
            order.append("responses")
        else:
            order.append(load_config(arguments[1]).name)
            trained.set()

    monkeypatch.setattr(Processes, "run", run)
    run_all(runs, lambda text: None, lambda arm: None, jobs=2)
    assert order.index("responses") < order.index("SFT-seed0") and order[0] == "OPDLM-seed0" and len(order) == 5


def test_runs_whose_responses_fail_are_not_trained(tmp_path, monkeypatch):
    arms = {"SFT": {"objective.method": "sft"}, "OPDLM": {}}
    runs = arms_of(ablation(tmp_path, arms=arms, claims=[], seeds=[0]))
    trained = []

    def run(self, arguments, log):
        if arguments[0] == "respond":
            raise WorkerError("no teacher")
        trained.append(load_config(arguments[1]).name)

    monkeypatch.setattr(Processes, "run", run)
    with pytest.raises(WorkerError, match=r"^no teacher$"):
        run_all(runs, lambda text: None, lambda arm: None, jobs=2, keep_going=True)
    assert trained == ["OPDLM-seed0"]


def test_a_run_begins_with_what_another_of_its_seed_has_held_out(tmp_path, monkeypatch):
    held_out = {"evaluation.problems": None, "evaluation.held_out_prompts": 16}
    other = {"teacher.path": "elsewhere"}
    arms = {"OPDLM": {}, "SFT": {"objective.method": "sft"}, "another teacher": other}
    runs = arms_of(ablation(tmp_path, arms=arms, claims=[], seeds=[0, 1], overrides=held_out))
    monkeypatch.setattr("deploy.ablation.runs._respond", lambda *_: None)

    def run(self, arguments, log):
        folder = load_config(arguments[1]).run_dir
        folder.mkdir(exist_ok=True)
        (folder / "seen").write_text(str((folder / "held_out.json").exists()))
        (folder / "held_out.json").write_text(f"of {folder.name}")
        (folder / "checkpoints" / "batch-000002").mkdir(parents=True)
        (folder / "checkpoints" / "final").mkdir()

    monkeypatch.setattr(Processes, "run", run)
    run_all(runs, lambda text: None, lambda arm: None)
    seen = {(arm.name, arm.seed): (arm.config.run_dir / "seen").read_text() for arm in runs}
    assert {key for key, value in seen.items() if value == "True"} == {("SFT", 0), ("SFT", 1)}
    left = {path.name for arm in runs for path in (arm.config.run_dir / "checkpoints").iterdir()}
    assert left == {"final"}  # nothing of a finished run could be gone on with


def test_the_table_of_runs_says_how_far_each_is(tmp_path):
    runs = arms_of(ablation(tmp_path, seeds=[0, 1]))
    states = ["finished", "training", "stopped"]
    for arm, state in zip(runs, states, strict=False):
        folder = arm.config.run_dir
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"state": state, "batch": 2, "batches": 40}))
        rows = [{"kl": 0.5, "eval/held_out_kl": 0.25}, {"kl": 0.4, "eval/held_out_kl": None}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kl": 0.3, "ev')
    console = Console(width=100, file=io.StringIO())
    console.print(runs_table([(arm, standing(arm)) for arm in runs]))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert rows[1:] == [
        ["OPDLM", "0", "finished", "2/40", "0.4000", "0.2500"],
        ["SFT", "0", "interrupted", "2/40", "0.4000", "0.2500"],  # no process works on it
        ["OPDLM", "1", "stopped", "2/40", "0.4000", "0.2500"],
        ["SFT", "1", "not", "begun"],
    ]
    with RunLock(runs[1].config.run_dir):
        assert standing(runs[1]).in_progress and standing(runs[1]).state == "training"


def drawn(tmp_path, monkeypatch, arms) -> dict[str, tuple[str, str]]:
    """(line style, color) of every curve that the report draws."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    settings = ablation(tmp_path, arms=arms, claims=[])
    results = [
        Result(arm, 0, {"exact_match": 0.9}, {"exact_match": 0.8}, {}, {}, [(1000.0, 0.4), (2000.0, 0.8)])
        for arm in settings.arms
    ]
    plot_curves(results, settings.arms, tmp_path / "curves.png")
    return {line.get_label(): (line.get_linestyle(), line.get_color()) for line in figures[0].axes[0].lines}


def test_curves_are_drawn_as_the_config_says_and_not_as_the_names_do(tmp_path, monkeypatch):
    arms = {
        "jumped to": {"block_size": 8},
        "b": {"block_size": 8, "style": {"line": "dotted"}},
        "c": {"style": {"line": "dashed", "color": "teal"}},
    }
    assert drawn(tmp_path, monkeypatch, arms) == {"jumped to": ("-", "C0"), "b": (":", "C1"), "c": ("--", "teal")}
    own = ablation(tmp_path, arms=arms, claims=[]).arms
    assert {name: arm.fields for name, arm in own.items()} == {
        "jumped to": {"block_size": 8},
        "b": {"block_size": 8},
        "c": {},
    }


def test_the_shipped_ablation_draws_block_16_apart():
    lines = {name: arm.style.line for name, arm in load_ablation("ablation").arms.items()}
    assert {line for name, line in lines.items() if "block 16" not in name} == {"solid"}
    assert {line for name, line in lines.items() if name.endswith("jumped to")} == {"dashed"}
    assert {line for name, line in lines.items() if name.endswith("grown into")} == {"dotted"}


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ({"line": "wavy"}, r"arms\.SFT\.style\.line: 'wavy' is unknown; choose solid, dashed, dotted, dashdot"),
        ({"color": "bluish"}, r"arms\.SFT\.style\.color: 'bluish' is no color of matplotlib"),
        ({"width": 3}, r"arms\.SFT\.style\.width: unknown field"),
    ],
)
def test_a_bad_style_is_refused_with_its_place(tmp_path, style, said):
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "base": "tiny", "arms": {"SFT": {"style": style}}}))
    with pytest.raises(ConfigError, match=said):
        load_ablation(str(file))


def test_the_arms_of_the_drafter_ablation():
    """Block, adapter's rank, what clean tokens see, what teaches, and whether the causal reading is trained too."""
    runs = arms_of(load_ablation("ablation-drafter"))
    found = {
        a.name: (
            a.config.block_size,
            a.config.adapter.rank if a.config.adapter.gated else 0,
            a.config.attention.context,
            a.config.teacher.backend,
            a.config.objective.terms.autoregressive > 0,
        )
        for a in runs
    }
    assert found == {
        "gated adapter, block 4": (4, 64, "causal", "self", False),
        "gated adapter, block 8": (8, 64, "causal", "self", False),
        "gated adapter of rank 16, block 8": (8, 16, "causal", "self", False),
        "all weights, block 4": (4, 0, "causal", "transformers", True),
        "all weights, block 8": (8, 0, "causal", "transformers", True),
        "OPDLM, block-causal": (4, 0, "block", "transformers", False),
        "OPDLM, context-causal": (4, 0, "causal", "transformers", True),
    }
    same = {(a.config.pipeline, a.config.evaluation, a.config.curriculum, a.config.data.prompts) for a in runs}
    assert len(same) == 1 and runs[0].config.evaluation.held_out_prompts == 256
