"""The suites of an ablation: each final model is evaluated once for its settings, and the report has the scores."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from common.conversion import convert_folder
from deploy import cli
from deploy.ablation.config import AblationConfig
from deploy.ablation.processes import Processes
from deploy.ablation.report import read_result, write_report
from deploy.ablation.runs import Arm, arms_of, how_far, run_all
from deploy.errors import WorkerError
from tests.unit.test_ablation import ablation, finish

ARLM = str(REPOSITORY / "deploy/models/tiny-arlm")
PROBLEMS = str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")
IFEVAL = {"suites": ["ifeval"], "slots": 8}


def with_suites(tmp_path: Path, **changes) -> AblationConfig:
    return ablation(tmp_path, **{"evaluate": IFEVAL, "seeds": [0, 1], "claims": [], **changes})


def row(rule: str, score: float, tokens_per_step: float) -> dict:
    """A row of opdlm eval's results, as far as it is read."""
    model = "original" if rule == "original" else "student"
    metrics = {"instruction_strict": {"mean": score}, "tokens_per_step": {"mean": tokens_per_step}}
    unmasking = None if rule == "original" else {"rule": rule}
    return {"suite": "ifeval", "score": "instruction_strict", "model": model, "unmasking": unmasking, "problems": 541,
            "metrics": metrics}  # fmt: skip


@pytest.fixture
def evaluations(monkeypatch) -> list[list[str]]:
    """The commands that were started in place of `opdlm eval`: SFT's scores are 0.2 lower, and rise with the seed."""
    started: list[list[str]] = []

    def run(self, arguments, log):
        started.append(arguments)
        folder = Path(arguments[1]).parent if arguments[0] == "score" else Path(arguments[1]).parent.parent
        if "--no-score" in arguments:
            (folder / "suites.unscored.json.gz").write_bytes(b"responses")
            return
        score = 0.5 - 0.2 * folder.name.startswith("SFT") + 0.01 * int(folder.name[-1]) * (1 + ("SFT" in folder.name))
        rows = [row("static", score, 1.0), row("dynamic", score - 0.1, 2.5)]
        if arguments[0] == "eval" and arguments[arguments.index("--original") + 1] != "none":
            rows.insert(0, row("original", 0.6, 1.0))
        (folder / "suites.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(Processes, "run", run)
    return started


def finished(settings: AblationConfig) -> list[Arm]:
    runs = arms_of(settings)
    for arm in runs:
        finish(arm, 0.9, 0.8)
    return runs


def test_each_final_model_is_evaluated_once_and_the_original_beside_the_first(tmp_path, evaluations):
    settings = with_suites(tmp_path)
    runs, calls = finished(settings), []
    assert how_far(runs) == "4 of 4 runs are finished, 0 evaluated"
    run_all(runs, lambda text: None, calls.append, jobs=2)
    assert sorted((arm.name, arm.seed) for arm in calls) == [("OPDLM", 0), ("OPDLM", 1), ("SFT", 0), ("SFT", 1)]
    assert how_far(runs) == "4 of 4 runs are finished, 4 evaluated"
    by_model = {arguments[1]: arguments[2:] for arguments in evaluations}
    assert list(by_model) and set(by_model) == {str(arm.config.run_dir / "checkpoints/final") for arm in runs}
    for place, arm in enumerate(runs):
        assert by_model[str(arm.config.run_dir / "checkpoints/final")] == [
            "--rule", "static", "--rule", "dynamic", "--suite", "ifeval", "--threshold", "0.9", "--slots", "8",
            "--dtype", "float32", "--original", "none" if place else arm.config.model.path,
            "--output", str(arm.config.run_dir / "suites.json"),
        ]  # fmt: skip
    run_all(runs, lambda text: None, calls.append)
    assert len(evaluations) == 4 and len(calls) == 4


def test_other_settings_evaluate_again_and_where_the_files_are_is_none_of_them(tmp_path, evaluations):
    runs = finished(with_suites(tmp_path))
    run_all(runs, lambda text: None, lambda arm: None)
    moved = {**IFEVAL, "slots": 64, "suite_data": str(tmp_path)}
    assert all(arm.evaluated for arm in arms_of(with_suites(tmp_path, evaluate=moved)))
    for changed in ({"threshold": 0.8}, {"dtype": "bfloat16"}, {"count": 10}, {"problems": PROBLEMS}):
        assert not any(arm.evaluated for arm in arms_of(with_suites(tmp_path, evaluate={**IFEVAL, **changed})))
    again = arms_of(with_suites(tmp_path, arms={"SFT": {"objective.method": "sft"}, "OPDLM": {}}))
    assert [(arm.name, arm.seed) for arm in again if not arm.evaluated] == [("SFT", 0)]  # the first lacks the original
    alone = arms_of(with_suites(tmp_path, evaluate={**IFEVAL, "original": False}))
    assert all(arm.evaluated for arm in alone)


def test_an_evaluation_that_failed_is_made_again_and_may_be_left_out(tmp_path, monkeypatch, evaluations):
    runs = finished(with_suites(tmp_path, seeds=[0]))
    run_all(runs, lambda text: None, lambda arm: None, evaluate=False)
    assert not evaluations
    made = Processes.run

    def fails(self, arguments, log):
        raise WorkerError("no memory")

    monkeypatch.setattr(Processes, "run", fails)
    with pytest.raises(WorkerError, match="no memory"):
        run_all(runs, lambda text: None, lambda arm: None)
    assert not any(arm.evaluated for arm in runs) and read_result(runs[0]).suites == {}
    monkeypatch.setattr(Processes, "run", made)
    run_all(runs, lambda text: None, lambda arm: None)
    assert all(arm.evaluated for arm in runs) and len(evaluations) == 2


def test_responses_are_kept_without_scores_and_scored_by_a_later_command(tmp_path, evaluations):
    settings = with_suites(tmp_path, seeds=[0])
    runs = finished(settings)
    for _ in range(2):  # the second makes nothing again
        run_all(runs, lambda text: None, lambda arm: None, score=False)
    assert [(arguments[0], arguments[-1]) for arguments in evaluations] == [("eval", "--no-score")] * 2
    assert how_far(runs) == "2 of 2 runs are finished, 0 evaluated"
    write_report(settings, runs, "small.yaml")
    assert "ifeval" not in settings.report.read_text()
    run_all(runs, lambda text: None, lambda arm: None)
    kept = [str(arm.config.run_dir / "suites.unscored.json.gz") for arm in runs]
    assert evaluations[2:] == [["score", file] for file in kept]
    assert all(arm.evaluated for arm in runs)
    other = arms_of(with_suites(tmp_path, seeds=[0], evaluate={**IFEVAL, "count": 10}))
    run_all(other, lambda text: None, lambda arm: None, score=False)
    assert not any(arm.evaluated for arm in other)  # the scores of the old settings are gone
    run_all(other, lambda text: None, lambda arm: None)
    assert [arguments[0] for arguments in evaluations[4:]] == ["eval", "eval", "score", "score"]


def test_the_report_has_the_scores_the_originals_and_verdicts_on_them(tmp_path, evaluations):
    claims = [
        {"text": metric, "better": "OPDLM", "worse": "SFT", "metric": metric}
        for metric in ("ifeval dynamic", "ifeval tokens_per_step")
    ]
    settings = with_suites(tmp_path, claims=claims)
    runs = finished(settings)
    run_all([arm for arm in runs if arm.name == "OPDLM"], lambda text: None, lambda arm: None)
    write_report(settings, runs, "small.yaml")
    rows = [line.split(" | ") for line in settings.report.read_text().splitlines()]
    (sft,) = [cells for cells in rows if cells[0] == "| SFT"]
    assert sft[6:9] == ["-", "-", "-"]  # not evaluated yet
    run_all(runs, lambda text: None, lambda arm: None)
    write_report(settings, runs, "small.yaml")
    text = settings.report.read_text()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines()}
    assert rows["| arm"][6:9] == ["ifeval static, %", "ifeval dynamic, %", "ifeval tokens/step, dynamic"]
    assert rows["| OPDLM"][6:9] == ["50.5 ± 0.7", "40.5 ± 0.7", "2.50"]
    assert rows["| SFT"][6:9] == ["31.0 ± 1.4", "21.0 ± 1.4", "2.50"]
    assert rows["| the original, token by token"][6:9] == ["60.0", "-", "-"]
    assert rows["| ifeval dynamic"][1:3] == ["ifeval dynamic: OPDLM against SFT", "+19.5 ± 0.7 points"]
    assert rows["| ifeval tokens_per_step"][1:3] == [
        "ifeval tokens per step: OPDLM against SFT",
        "+0.00 ± 0.00 tokens",
    ]
    assert "each final model decodes ifeval (541 problems) greedily" in text
    stored = json.loads((tmp_path / "benchmarks" / "small.json").read_text())
    assert [sorted(result["suites"]["ifeval"]) for result in stored] == [["dynamic", "original", "static"]] + [
        ["dynamic", "static"]
    ] * 3
    assert stored[1]["suites"]["ifeval"]["static"]["score"] == pytest.approx(0.3)


def test_a_run_is_evaluated_when_it_is_finished_and_the_command_says_so(tmp_path, monkeypatch, evaluations):
    settings = with_suites(tmp_path, seeds=[0], arms={"OPDLM": {}})
    monkeypatch.setattr("deploy.ablation.runs._train", lambda arm, runs, processes: finish(arm, 0.9, 0.8))
    monkeypatch.setattr("deploy.commands.ablate.check_writable", lambda *_: None)
    monkeypatch.setattr("deploy.evaluation.suite_options.check_scorer", lambda *_: None)
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    first = CliRunner().invoke(cli.app, ["ablate", str(file), "--no-evaluate"], catch_exceptions=False)
    assert "all 1 runs are finished; the report is" in first.output and not evaluations
    (tmp_path / "ifeval.jsonl").write_text("")
    command = ["ablate", str(file), "--suite-data", str(tmp_path)]
    second = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert "OPDLM, seed 0: ifeval" in second.output and "all 1 runs are finished and evaluated" in second.output
    kept = CliRunner().invoke(cli.app, [*command, "--no-score"], catch_exceptions=False)
    assert "all 1 runs are finished, and the responses to suites kept" in kept.output
    (arguments,) = evaluations  # there is nothing left to keep
    assert arguments[arguments.index("--suite-data") + 1] == str(tmp_path)
    report = settings.report.read_text()
    assert "| OPDLM | 1 | 90.0 | 80.0 | 10.0 | 2.00 | 50.0 | 40.0 | 2.50 |" in report
    runs = arms_of(with_suites(tmp_path, name="fresh", seeds=[0], arms={"OPDLM": {}}))
    calls: list[Arm] = []
    run_all(runs, lambda text: None, calls.append)  # both in one
    assert calls == runs * 2 and runs[0].done and runs[0].evaluated


@pytest.mark.parametrize(
    ("section", "options", "said"),
    [
        ({"suites": ["ifevil"]}, [], r"evaluate: --suite: 'ifevil' is unknown; choose gsm8k"),
        ({"suites": ["gsm8k"]}, ["--suite-data", "nowhere"], r"evaluate: --suite-data: 'nowhere' is no folder"),
        ({"suites": ["humaneval"]}, [], r"evaluate: --suite humaneval: runs the programs"),
        ({}, [], r"evaluate: neither suites nor problems are given; give one, or leave the section out"),
        (None, ["--suite-data", "."], r"--suite-data: this ablation evaluates no suites; give it an evaluate section"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_trained(tmp_path, section, options, said):
    base = with_suites(tmp_path, evaluate=None).model_dump(mode="json")
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump({**base, "evaluate": section}))
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(cli.app, ["ablate", str(file), *options], catch_exceptions=False)


def test_a_claim_names_a_suite_of_the_ablation(tmp_path):
    claim = {"text": "x", "better": "OPDLM", "worse": "SFT", "metric": "gsm8k static"}
    with pytest.raises(ValueError, match=r"claim 'x' names suite 'gsm8k'; suites of evaluate are ifeval"):
        with_suites(tmp_path, claims=[claim])


def test_a_final_model_is_really_evaluated_on_problems(tmp_path):
    """By the commands themselves, as processes: the tiny student before any training, beside its original, of which
    the responses are kept first and scored then."""
    evaluate = {"problems": PROBLEMS, "count": 4, "max_new_tokens": 72}
    settings = with_suites(tmp_path, seeds=[0], arms={"OPDLM": {}}, evaluate=evaluate, overrides={"model.path": ARLM})
    (arm,) = finished(settings)
    convert_folder(ARLM, arm.config.run_dir / "checkpoints/final", 4, "<|mask|>", torch.float32)
    run_all([arm], lambda text: None, lambda arm: None, score=False)
    assert arm.has_responses(scored=False) and not arm.evaluated
    run_all([arm], lambda text: None, lambda arm: None)
    scores = read_result(arm).suites["word_problems_heldout"]
    assert set(scores) == {"original", "static", "dynamic"}
    assert all(found["problems"] == 4 and 0 <= found["score"] <= 1 for found in scores.values())
    assert scores["dynamic"]["tokens_per_step"] >= scores["static"]["tokens_per_step"] > 0.5
    assert scores["original"]["score"] > scores["static"]["score"] == 0  # the untrained student solves none
    assert not (arm.config.run_dir / "suites.json.parts").exists() and arm.evaluated
