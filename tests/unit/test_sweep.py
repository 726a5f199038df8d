"""Sweeps: what is run, what its rows say, how they are shown, and how an interrupted one goes on."""

import gzip
import io
import json
import shutil
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from actors.evaluation import worker
from actors.evaluation.responses import Response
from actors.evaluation.worker import ModelSpec
from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from common.config.unmasking import DynamicUnmasking, StaticUnmasking, Unmasking
from deploy import cli
from deploy.commands import eval as eval_command
from deploy.evaluation import statistics
from deploy.evaluation.problems import Problem, SuiteProblems
from deploy.evaluation.results import Row, Scored, powers, rows_of
from deploy.evaluation.scoring import Score
from deploy.evaluation.suites import SUITES, plain_suite
from deploy.evaluation.sweep import Progress, Run, Setting, Sweep, settings_of
from deploy.evaluation.sweep_report import pareto_front, plot, tables
from tests.models import tiny_qwen3

HELDOUT = str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")
ARLM = str(REPOSITORY / "deploy/models/tiny-arlm")
PROBLEMS = 10


def suite(name: str = "sums") -> SuiteProblems:
    problems = [Problem(i, str(i), f"{i}?", np.zeros(3, np.int32), {}, "1") for i in range(PROBLEMS)]
    return SuiteProblems(SUITES.get(name) or plain_suite(name), "here", problems, (), "", 0, {}, ())


def run(tokens: int = 12, steps: int = 6, samples: int = 1, seconds: float = 1.0) -> Run:
    ids = np.zeros(tokens, np.int32)
    responses = [Response(i, s, ids, "", steps, 3, "eos") for i in range(PROBLEMS) for s in range(samples)]
    return Run(responses, seconds)


def scored(
    right: list[int], setting: Setting | None = None, model: str = "student", name: str = "sums", **options
) -> Scored:
    """One run for each number of right answers, which are those of the first problems."""
    runs = [run(**options) for _ in right]
    scores = [
        [Score({"exact_match": (r.ordinal < n, 1)}) for r in of.responses] for of, n in zip(runs, right, strict=True)
    ]
    spec = ModelSpec(model, "here", "float32", 8)
    return Scored(suite(name), spec, setting or Setting(DynamicUnmasking(), 4), runs, scores)


def row(right: int, steps: int, setting: Setting | None = None) -> Row:
    return rows_of([scored([right], setting, steps=steps)])[0]


def test_every_rule_with_every_value_of_its_own_parameter_at_every_block_size():
    settings = settings_of(["static", "dynamic", "dynamic"], [0.8, 0.9], [1, 2], [0.1], [0.6], [4, 8])
    assert [(s.decoding, s.block_size) for s in settings] == [
        (decoding, size) for size in (4, 8) for decoding in ("static 1", "static 2", "dynamic 0.8", "dynamic 0.9")
    ]
    assert settings[1].unmasking == StaticUnmasking(steps_per_block=2)
    both = settings_of(["sequential", "entropy_bound"], [0.9], [3], [0.1, 1.0], [0.6], [4])
    assert [s.decoding for s in both] == ["sequential 3", "entropy 0.1", "entropy 1"]
    (by_original,) = settings_of(["speculative"], [0.9], [1], [0.1], [0.6], [4], verify="base")
    assert by_original.decoding == "speculative 1 by original" and by_original.unmasking.verify == "base"
    drafts = settings_of(["speculative"], [0.8, 0.9], [1], [0.1], [0.6], [4], [1, 2])
    assert [s.decoding for s in drafts] == ["speculative 1", "speculative 2 0.8", "speculative 2 0.9"]
    bounds = settings_of(["adaptive"], [0.8, 0.9], [1], [0.1], [0.5, 0.6], [4])
    assert [s.decoding for s in bounds] == [
        f"adaptive {lower}-{upper}" for lower in ("0.5", "0.6") for upper in ("0.8", "0.9")
    ]
    with pytest.raises(ConfigError, match=r"--lower: 0\.85 is above --threshold 0\.8"):
        settings_of(["adaptive"], [0.8, 0.9], [1], [0.1], [0.85], [4])
    with pytest.raises(ConfigError, match="3 does not divide block size 4"):
        settings_of(["static"], [0.9], [3], [0.1], [0.6], [4])


def test_metrics_are_ratios_of_sums():
    (found,) = rows_of([scored([5], steps=6)])
    assert {name: metric.mean for name, metric in found.metrics.items()} == {
        "exact_match": 0.5,
        "tokens_per_step": 2.0,
        "forwards_per_token": 0.5,
        "forwards_per_token_with_commits": 0.75,
        "response_tokens_mean": 12.0,
        "share_ended": 1.0,
        "tokens_per_second": 120.0,
    }
    assert (found.problems, found.samples, found.seconds, found.score) == (10, 1, 1.0, "exact_match")
    assert found.metrics["exact_match"].interval == statistics.wilson(5, 10)


def test_deviation_over_seeds_or_over_problems():
    (seeds,) = rows_of([scored([4, 5, 6])])
    assert seeds.metrics["exact_match"].mean == pytest.approx(0.5)
    assert seeds.metrics["exact_match"].std == pytest.approx(0.1)  # n - 1
    assert seeds.metrics["exact_match"].seeds == (0.4, 0.5, 0.6)
    assert seeds.metrics["tokens_per_second"].std == 0
    one = row(5, 6)
    assert one.metrics["exact_match"].std == pytest.approx((0.25 / 10) ** 0.5, rel=0.1)
    assert one.metrics["tokens_per_second"].std is None


def test_several_samples_give_their_mean_and_pass_at_k():
    of = scored([10], samples=4)
    scores = [[Score({"exact_match": (r.sample < r.ordinal % 5, 1)}) for r in of.runs[0].responses]]
    (found,) = rows_of([replace(of, scores=scores)])  # two problems each with 0, 1, 2, 3 and 4 right of 4
    assert found.samples == 4
    assert found.metrics["exact_match"].mean == 0.5
    assert found.metrics["pass@2"].mean == pytest.approx(np.mean([0, 1 / 2, 5 / 6, 1, 1]))
    assert found.metrics["pass@4"].mean == 0.8
    assert [powers(n) for n in (1, 2, 3, 8, 10)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]


def test_students_are_compared_with_the_original_of_their_suite():
    found = rows_of(
        [
            scored([8], Setting(), "original"), scored([5]), scored([8]),
            scored([9], name="other"),
        ]
    )  # fmt: skip
    original, worse, equal, alone = (r.metrics["exact_match"].difference for r in found)
    assert original is None and alone is None
    assert worse[0] == pytest.approx(-0.3) and worse[1][0] < -0.3 < worse[1][1] < 0
    assert equal == (0, (0, 0))


def test_instructions_that_cannot_be_checked_are_counted_and_leave_prompts_out():
    ratios = [
        {"instruction_strict": (1, 2), "prompt_strict": (0, 1), "instruction_loose": (2, 2), "prompt_loose": (1, 1)}
    ]
    ratios += [
        {"instruction_strict": (1, 1), "prompt_strict": (0, 0), "instruction_loose": (1, 1), "prompt_loose": (0, 0)}
    ]
    runs = [Run(run().responses, 1.0)]
    scores = [[Score(ratios[i % 2], {"unchecked": i % 2}) for i in range(PROBLEMS)]]
    spec = ModelSpec("student", "here", "float32", 8)
    (found,) = rows_of([Scored(suite("ifeval"), spec, Setting(DynamicUnmasking(), 4), runs, scores)])
    assert found.score == "instruction_strict"
    assert found.mean("instruction_strict") == pytest.approx(10 / 15)
    assert (found.mean("prompt_strict"), found.mean("prompt_loose")) == (0, 1)
    assert found.facts == {"unchecked": 5}
    assert shown([found], 80).count("5 instructions a row could not be checked") == 1


def test_greedy_decoding_runs_once_whatever_the_seeds():
    assert list(Sweep([], 8, temperature=0.0, seeds=3).run_seeds) == [0]
    assert list(Sweep([], 8, temperature=1.0, seeds=3).run_seeds) == [0, 1, 2]


def test_responses_end_at_the_limit_or_where_the_positions_do():
    problems = [Problem(i, "", "", np.zeros(n, np.int32), {}) for i, n in enumerate((3, 90))]
    swept = Sweep([], 100, samples=2)
    of = replace(suite("gsm8k"), problems=problems, stop=("x",))
    requests = swept.requests(of)
    assert [(r.ordinal, r.sample, r.max_new_tokens, r.stop) for r in requests] == [
        (0, 0, 97, ("x",)), (0, 1, 97, ("x",)), (1, 0, 10, ("x",)), (1, 1, 10, ("x",)),
    ]  # fmt: skip
    assert [r.max_new_tokens for r in Sweep([], 100, max_new_tokens=20).requests(of)] == [20, 10]
    assert of.less_room(20, 100) == 1


def test_pareto_front_holds_what_nothing_beats():
    best, fast, beaten, equal = row(9, 12), row(5, 3), row(4, 6), row(5, 6)
    assert pareto_front([beaten, best, fast, equal]) == [fast, best]


def shown(rows: list[Row], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    for table in tables(rows, width):
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("samples", [1, 8])
def test_table_fits_its_width(width, samples):
    settings = [Setting(), Setting(DynamicUnmasking(threshold=0.95), 16)]
    rows = rows_of(
        [
            scored([10, 9], settings[0], "original", samples=samples, tokens=1234),
            scored([9, 10], settings[1], samples=samples, tokens=1234, seconds=0.1),
        ]
    )
    text = shown(rows, width)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "dynamic 0.95" in text and "block 16" in text
    assert "sums: right answers, 10 problems" in text
    assert "minus AR: paired by problem" in text.replace("\n", " ")
    assert ("pass@8" in text) == (samples > 1)


def test_each_suite_has_a_table():
    text = shown([row(5, 6), rows_of([scored([5], name="other")])[0]], 80)
    assert text.count("right answers, 10 problems") == 2


def test_plot_is_a_png_that_is_not_blank(tmp_path):
    rows = [row(c, s, Setting(DynamicUnmasking(threshold=c / 10), b)) for c, s, b in ((9, 6, 4), (7, 4, 4), (5, 3, 8))]
    rows += rows_of([scored([9], Setting(), "original", steps=12)])
    for name, group in (("one", rows), ("two", [*rows, *(replace(r, suite="other") for r in rows)])):
        plot(group, tmp_path / f"{name}.png", "title")
        image = imread(tmp_path / f"{name}.png")
        assert image.shape == (750, 1200 if name == "one" else 2400, 4)
        assert len(np.unique(image.reshape(-1, 4), axis=0)) > 20


def test_every_rule_can_be_plotted(tmp_path):
    rules = [rule() for rule in get_args(get_args(Unmasking)[0])]
    assert len(rules) > 5
    plot([row(5, 4, Setting(rule, 4)) for rule in rules], tmp_path / "rules.png", "title")


def test_scoring_is_told_step_by_step():
    told: list[object] = []
    progress = Progress(lambda what, steps: told.append((what, steps)), lambda steps: told.append(steps))
    spec = ModelSpec("student", "here", "float32", 8)
    found = Scored.of(suite(), spec, Setting(DynamicUnmasking(), 4), [run(), run()], progress)
    assert told == [("sums, dynamic 0.9: scoring", 20), *[1] * 20]
    assert [score.ratios for score in found.scores[0]] == [{"exact_match": (0, 1)}] * PROBLEMS


@pytest.fixture
def opdlm(monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "console", Console(width=80))

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["opdlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert not end.value.code, said.err
        return said.out

    return command


@pytest.mark.parametrize("temperature", [0, 1])
def test_one_command_sweeps_and_writes(tmp_path, opdlm, temperature):
    student, output = tmp_path / "student", tmp_path / "eval.json"
    opdlm("convert", tiny_qwen3(tmp_path / "arlm"), student)
    out = opdlm(
        "eval", student, "--problems", HELDOUT, "--rule", "static", "--rule", "dynamic", "--threshold", 0,
        "--threshold", 0.5, "--block-size", 4, "--block-size", 8, "--seeds", 2, "--temperature", temperature,
        "--teacher", ARLM, "--count", 3, "--max-new-tokens", 8, "--output", output,
    )  # fmt: skip
    report = json.loads(output.read_text())
    rows = report["rows"]
    assert [(r["model"], r["decoding"], r["block_size"]) for r in rows] == [
        ("original", "AR", None),
        *(("student", d, b) for b in (4, 8) for d in ("static 1", "dynamic 0", "dynamic 0.5")),
    ]
    assert {len(r["metrics"]["exact_match"]["seeds"]) for r in rows} == {2 if temperature else 1}
    assert rows[0]["metrics"]["tokens_per_step"]["mean"] == 1
    assert rows[2]["metrics"]["tokens_per_step"]["mean"] > rows[1]["metrics"]["tokens_per_step"]["mean"]
    assert [r["metrics"]["exact_match"]["difference"] is None for r in rows] == [True, *[False] * 6]
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    (asked,) = report["suites"]
    assert (asked["source"], asked["problems"], asked["max_new_tokens"]) == (HELDOUT, 3, 8)
    assert out.count("dynamic 0.5") >= 2
    assert ("over 2 seeds" in out) == bool(temperature)
    every = [json.loads(line) for line in (tmp_path / "eval.problems.jsonl").read_text().splitlines()]
    assert len(every) == 7 * 3 * (2 if temperature else 1)
    right = sum(r["scores"]["exact_match"][0] for r in every if r["model"] == "original")
    assert right / (3 * (2 if temperature else 1)) == rows[0]["metrics"]["exact_match"]["mean"]
    assert not (tmp_path / "eval.json.parts").exists()


def test_an_interrupted_command_goes_on_where_it_stood(tmp_path, opdlm, monkeypatch):
    student, output = tmp_path / "student", tmp_path / "eval.json"
    opdlm("convert", tiny_qwen3(tmp_path / "arlm"), student)
    monkeypatch.setattr("deploy.evaluation.sweep._CHUNK", 2)
    command = (
        "eval", student, "--problems", HELDOUT, "--original", ARLM, "--count", 5, "--max-new-tokens", 8,
        "--temperature", 1, "--samples", 2, "--slots", 2, "--output", output,
    )  # fmt: skip
    opdlm(*command)
    whole, answers = json.loads(output.read_text()), (tmp_path / "eval.problems.jsonl").read_text()
    output.unlink()
    seen: list[tuple[str, int]] = []
    respond = worker.EvaluationWorker.respond

    def dying(self, chunks, *settings):
        for answered in respond(self, chunks, *settings):
            seen.append((self.spec.kind, answered.index))
            if len(seen) == 8:
                raise KeyboardInterrupt
            yield answered

    monkeypatch.setattr(worker.EvaluationWorker, "respond", dying)
    monkeypatch.setattr(sys, "argv", ["opdlm", *map(str, command)])
    with pytest.raises(SystemExit):
        cli.main()
    parts = list((tmp_path / "eval.json.parts").iterdir())
    assert len(parts) == 7 and not output.exists()

    def counting(self, chunks, *settings):
        seen.extend((self.spec.kind, chunk.index) for chunk in chunks)
        yield from respond(self, chunks, *settings)

    seen.clear()
    monkeypatch.setattr(worker.EvaluationWorker, "respond", counting)
    opdlm(*command)
    assert len(seen) == 3 * 5 - 7  # static, dynamic and the original, five parts each
    assert (tmp_path / "eval.problems.jsonl").read_text() == answers
    again = json.loads(output.read_text())
    for before, now in zip(whole["rows"], again["rows"], strict=True):
        timed = "tokens_per_second"
        assert {**before["metrics"], timed: 0} == {**now["metrics"], timed: 0}

    # other settings take nothing from parts that they would not make
    output.unlink()
    seen.clear()
    opdlm(*command, "--rule", "static", "--max-new-tokens", 9)
    assert len(seen) == 2 * 5


def test_responses_are_scored_elsewhere_as_they_would_have_been_here(tmp_path, opdlm, monkeypatch):
    student, ifeval = tmp_path / "student", tmp_path / "ifeval.jsonl"
    opdlm("convert", tiny_qwen3(tmp_path / "arlm"), student)
    rows = [("yes", "punctuation:no_comma", {}), ("no", "change_case:english_lowercase", {})] * 2
    ifeval.write_text(
        "".join(
            json.dumps({"key": i, "prompt": f"Say {word}.", "instruction_id_list": [name], "kwargs": [options]}) + "\n"
            for i, (word, name, options) in enumerate(rows)
        )
    )
    command = (
        "eval", student, "--suite", f"ifeval={ifeval}", "--problems", HELDOUT, "--original", ARLM, "--count", 3,
        "--max-new-tokens", 8, "--temperature", 1, "--seeds", 2,
    )  # fmt: skip
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    opdlm(*command, "--output", here)
    with monkeypatch.context() as context:
        context.setattr("deploy.evaluation.ifeval._PACKAGES", ("no_such_package",))
        out = opdlm(*command, "--output", there, "--no-score")
    assert not there.exists() and not (tmp_path / "there.json.parts").exists()
    assert "opdlm score" in out
    shutil.rmtree(student)  # neither the models nor the suites are needed
    ifeval.unlink()
    opdlm("score", tmp_path / "there.unscored.json.gz")
    reports = [json.loads(file.read_text()) for file in (here, there)]
    for report in reports:
        for row in report["rows"]:
            row["seconds"] = row["metrics"]["tokens_per_second"] = None
    assert reports[0] == reports[1]
    assert [r["suite"] for r in reports[1]["rows"]] == ["ifeval"] * 3 + ["word_problems_heldout"] * 3
    assert (tmp_path / "here.problems.jsonl").read_text() == (tmp_path / "there.problems.jsonl").read_text()
    assert (tmp_path / "there.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_file_of_responses_is_refused(tmp_path):
    from deploy.commands.score import score

    for name, content, said in (
        ("results.json", b"{}", r"is no \.unscored\.json\.gz file"),
        ("a.unscored.json.gz", b"{}", "is no file of responses"),
        ("b.unscored.json.gz", gzip.compress(b'{"format_version": 9}'), "has format version 9, not 1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            score(tmp_path / name)


def test_the_original_is_the_one_of_the_runs_config(tmp_path, opdlm):
    from deploy.evaluation.original import original_of

    final = tmp_path / "run" / "checkpoints" / "final"
    opdlm("convert", ARLM, final)
    assert "give its folder as --original" in original_of(str(final), None)[1]
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {ARLM}}}\ndata: {{prompts: {HELDOUT}}}\nname: run\n")
    assert original_of(str(final), None) == (ARLM, f"original, as the run's config names it: {ARLM}")
    assert original_of(str(final), "other") == ("other", "")
    assert original_of(str(final), "none") == (None, "")
    out = opdlm("eval", final, "--problems", HELDOUT, "--count", 2, "--max-new-tokens", 4)
    assert "original" in out and "minus AR" in out
    (tmp_path / "run" / "config.yaml").write_text(
        f"model: {{path: {tmp_path}/gone}}\ndata: {{prompts: {HELDOUT}}}\nname: run\n"
    )
    assert original_of(str(final), None)[0] is None


def test_processes_are_checked_before_the_start(opdlm, capsys):
    for arguments, said in (
        (["--actors", 2, "--gpus", 1], "--actors: are processes on CPUs; leave it out with --gpus"),
        (["--address", "auto"], "--address: say how many processes to use there"),
        (["--samples", 2], "--samples: 2 greedy responses would be the same"),
    ):
        with pytest.raises(AssertionError, match=said):
            opdlm("eval", ARLM, "--problems", HELDOUT, *arguments)
