"""The report of `make real`: what its JSON says of a run's files, and the page that is made from it."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from actors.evaluation.responses import Response
from actors.evaluation.worker import ModelSpec
from common.config.file import REPOSITORY
from common.config.unmasking import DynamicUnmasking, StaticUnmasking
from deploy.demo import real_report
from deploy.demo.real_results import ends_in_a_loop, main_rows, repeated_share, results_of
from deploy.evaluation import unscored
from deploy.evaluation.problems import Problem, SuiteProblems
from deploy.evaluation.suites import SUITES
from deploy.evaluation.sweep import Run, Setting

PAGE = REPOSITORY / "docs" / "real-model.md"


def metric(mean, difference=None):
    interval = [mean - 0.02, mean + 0.02]
    found = [difference, [difference - 0.02, difference + 0.02]] if difference is not None else None
    return {"mean": mean, "interval": interval, "difference": found}


def row(model, decoding, score, tokens_per_step, *, length=200.0, ended=0.9, suite="ifeval", difference=None):
    name = "instruction_strict" if suite == "ifeval" else "exact_match"
    metrics = {name: metric(score, difference), "share_ended": metric(ended), "response_tokens_mean": metric(length)}
    metrics |= {"tokens_per_step": metric(tokens_per_step), "tokens_per_second": metric(5000.0)}
    metrics |= {"forwards_per_token_with_commits": metric(1 / tokens_per_step)}
    facts = {"unchecked": 30} if suite == "ifeval" else {}
    return {
        "suite": suite, "score": name, "model": model, "decoding": decoding, "problems": 541, "metrics": metrics,
        "facts": facts,
    }  # fmt: skip


ROWS = [
    row("original", "AR", 0.28, 1.0),
    row("student", "static 1", 0.27, 0.99, length=190, difference=-0.01),
    row("student", "dynamic 0.9", 0.268, 1.5, length=195, difference=-0.012),
    row("student", "dynamic 0.7", 0.265, 1.9, length=250, difference=-0.015),
    row("original", "AR", 0.02, 1.0, suite="gsm8k"),
    row("student", "static 1", 0.01, 0.98, suite="gsm8k", difference=-0.01),
]


def batch(number):
    return {
        "batch": number, "kl": 2.0 / (number + 1), "eval/held_out_kl": [None, 1.5, None, 0.5][number],
        "tokens_per_step": 1.0 + number / 10, "response_length": 100.0, "share_eos": 0.9, "updates": 8 * (number + 1),
        "response_tokens": 1000 * (number + 1), "gpu_hours": 0.01 * (number + 1), "seconds/batch": 30.0,
        "flops/rollout": 1e15, "flops/teacher": 1e14, "flops/learner": 3e14,
    }  # fmt: skip


def long_run(kind, setting, texts):
    responses = [
        Response(i, 0, np.asarray(ids, np.int32), f"text {kind} {i}", 10, 3, reason)
        for i, (ids, reason) in enumerate(texts)
    ]
    problems = [Problem(i, str(i), f"<question> {i}|", np.zeros(2, np.int32), {}) for i in range(len(texts))]
    suite = SuiteProblems(SUITES["ifeval"], "here", problems, (), "{question}", 0, {}, ())
    return unscored.Unscored(suite, ModelSpec(kind, "here", "float32", 8), setting, [Run(responses, 1.0)])


@pytest.fixture
def folder(tmp_path):
    run_dir = tmp_path / "smollm2-135m"
    (tmp_path / "at").mkdir()
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(batch(i)) + "\n" for i in range(4)))
    kl = {"held_out_kl_init": {"mean": 4.0, "by_offset": [3, 5]}, "held_out_kl": {"mean": 0.5, "by_offset": [0.4, 0.6]}}
    (run_dir / "summary.json").write_text(json.dumps(kl))
    (tmp_path / "eval.json").write_text(json.dumps({"device": "a card", "versions": {"torch": "2"}, "rows": ROWS}))
    at = [row("student", "static 1", 0.2, 0.99), row("student", "dynamic 0.9", 0.19, 1.4)]
    (tmp_path / "at" / "batch-000002.json").write_text(json.dumps({"rows": at}))
    loop = [1, 2, 3] * 20
    every = [
        long_run("original", Setting(), [(range(40), "eos"), (loop, "length")]),
        long_run("student", Setting(StaticUnmasking(), 4), [(range(50), "eos"), (range(10), "eos")]),
        long_run("student", Setting(DynamicUnmasking(), 4), [(loop, "length"), (loop, "length")]),
    ]
    unscored.save(tmp_path / "long.unscored.json.gz", {"suites": [{"max_new_tokens": 60}]}, every)
    return tmp_path


def test_the_json_says_what_the_runs_files_say(folder):
    found = results_of(folder, folder / "smollm2-135m")
    assert (found["ar"]["ifeval"], found["ar"]["gsm8k"]) == pytest.approx((28, 2))
    assert found["static"]["ifeval"] == pytest.approx(27)
    assert found["static"]["minus_ar"][0] == pytest.approx(-1)
    assert (found["dynamic"]["decoding"], found["dynamic"]["tokens_per_step"]) == ("dynamic 0.7", 1.9)
    assert (found["response_tokens"], found["gpu_minutes"], found["seconds"]) == (4000, pytest.approx(2.4), 120)
    assert found["kl"] == pytest.approx((2 + 1 + 2 / 3 + 0.5) / 4)
    assert (found["held_out_kl_before"], found["held_out_kl"], found["held_out_kl_by_offset"]) == (4, 0.5, [0.4, 0.6])
    points = [(point["response_tokens"], point["held_out_kl"], point["kl"]) for point in found["curve"]]
    assert points[:3] == [(0, 4, None), (1000, None, 2), (2000, 1.5, 1)]
    assert found["ifeval_at"] == [{"response_tokens": 2000, "static 1": 20.0, "dynamic 0.9": 19.0}]
    original, static, dynamic = found["long"]["rows"]
    assert (original["ended"], static["ended"], dynamic["ended"]) == (50, 100, 0)
    assert (original["in_a_loop"], static["in_a_loop"], dynamic["in_a_loop"]) == (50, 0, 100)
    assert (original["tokens_mean"], static["tokens_median"]) == (50, 30)
    assert original["repeated_4grams"] == pytest.approx(100 * (0 + 54 / 57) / 2)
    assert found["long"]["examples"][1]["responses"] == {
        "original, AR": "text original 1", "student, static 1": "text student 1",
        "student, dynamic 0.9": "text student 1",
    }  # fmt: skip


def test_where_no_threshold_is_fast_the_highest_counts():
    rows = [{"suite": "ifeval", "decoding": d, "tokens_per_step": s, "score": 1.0, "difference": None, "ended": 1.0,
             "tokens_per_second": 1.0, "forwards_per_token_with_commits": 1.0, "response_tokens_mean": 1.0}
            for d, s in (("AR", 1.0), ("static 1", 1.0), ("dynamic 0.7", 1.7), ("dynamic 0.9", 1.3))]  # fmt: skip
    assert main_rows(rows)["dynamic"]["decoding"] == "dynamic 0.9"
    rows[2]["tokens_per_step"] = 1.8
    assert main_rows(rows)["dynamic"]["decoding"] == "dynamic 0.7"


def test_repetitions():
    assert repeated_share(np.arange(3)) == 0
    assert repeated_share(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)
    assert ends_in_a_loop(np.array([9] * 32))
    assert not ends_in_a_loop(np.array([9] * 31))
    assert ends_in_a_loop(np.concatenate([np.arange(100), np.tile(np.arange(64), 3)]))
    assert not ends_in_a_loop(np.concatenate([np.arange(100), np.tile(np.arange(64), 2)]))  # twice only
    assert not ends_in_a_loop(np.tile(np.arange(65), 3))  # too long a run
    assert not ends_in_a_loop(np.array([9] * 40 + [1]))


def test_the_report_fills_in_the_page_and_says_what_is_reached(folder, tmp_path, capsys):
    docs = tmp_path / "docs"
    for name in ("benchmarks", "images"):
        (docs / name).mkdir(parents=True)
    (docs / "real-model.md").write_text(PAGE.read_text())
    real_report.write(folder, folder / "smollm2-135m", docs)
    out, page = capsys.readouterr().out, (docs / "real-model.md").read_text()
    for text in (out, page):
        assert "| ifeval | original | AR | 28.0 (26.0 to 30.0) |  | 1.00 | 1.00 | 5,000 | 200 | 90.0 |" in text
        assert "| student | dynamic 0.7 | 26.5 (24.5 to 28.5) | -1.5 (-3.5 to +0.5) | 1.90 |" in text
        assert "30 instructions a row could not be checked" in text
        assert "| static minus AR, points, 95% | at least -1.5 | -1.0 (-3.0 to +1.0) | yes |" in text
        assert "| -0.5, at 1.90 | yes |" in text
        assert "| response length, of AR's: static, dynamic 0.7 | within 10% | 0.95, 1.25 | **no** |" in text
        assert "| response tokens | 4,000 |" in text and "by offset in the block | 0.400, 0.600 |" in text
    assert "**Prompt.** &lt;question&gt; 1\\|" in page
    assert "To be filled in" not in page and "images/real-curves.png" in page
    raw = (docs / "benchmarks" / "real.json").read_text()
    assert raw == (folder / "real.json").read_text()
    assert real_report.page(PAGE.read_text(), json.loads(raw)) == page  # the JSON is all that the page needs
    image = imread(docs / "images" / "real-curves.png")
    assert image.shape == (1350, 1200, 4) and len(np.unique(image.reshape(-1, 4), axis=0)) > 20


def test_a_run_that_is_not_evaluated_yet_leaves_the_other_parts_alone(folder):
    for name in ("eval.json", "long.unscored.json.gz", "at/batch-000002.json", "smollm2-135m/summary.json"):
        (folder / name).unlink()
    real_report.write(folder, folder / "smollm2-135m", None)
    page = real_report.page(PAGE.read_text(), json.loads((folder / "real.json").read_text()))
    assert "| response tokens | 4,000 |" in page
    before = real_report._MARKED.findall(PAGE.read_text())
    assert set(before) == {"results", "bars", "training", "curves", "long", "examples"}


def test_the_page_in_the_repository_is_made_from_its_json():
    raw = REPOSITORY / "docs" / "benchmarks" / "real.json"
    if not raw.exists():
        assert "To be filled in from a run" in PAGE.read_text()
    else:
        assert real_report.page(PAGE.read_text(), json.loads(raw.read_text())) == PAGE.read_text()
