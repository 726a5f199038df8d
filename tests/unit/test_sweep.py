"""Sweeps of decoding settings: what is run, what the deviation is of, and how it is shown."""

import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from actors.evaluation.evaluation import Evaluation
from actors.evaluation.responses import Response
from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from common.config.run import DynamicUnmasking, StaticUnmasking
from deploy import cli
from deploy.commands import eval as eval_command
from deploy.evaluation.sweep import Row, Setting, Sweep, row_of, settings_of
from deploy.evaluation.sweep_report import pareto_front, plot, table
from tests.models import tiny_qwen3

HELDOUT = str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")
ARLM = str(REPOSITORY / "deploy/models/tiny-arlm")


def evaluation(correct: int, tokens: int = 12, steps: int = 6) -> Evaluation:
    done = Evaluation(seconds=1.0)
    for i in range(10):
        done.add(Response(i, 0, np.zeros(tokens, np.int32), "", steps, 3, "eos"), i < correct)
    return done


def row(accuracy: int, steps: int, setting: Setting | None = None) -> Row:
    return row_of("student", "here", setting or Setting(DynamicUnmasking(), 4), [evaluation(accuracy, 12, steps)])


def test_every_rule_with_every_value_of_its_own_parameter_at_every_block_size():
    settings = settings_of(["static", "dynamic", "dynamic"], [0.8, 0.9], [1, 2], [0.1], [4, 8])
    assert [(s.decoding, s.block_size) for s in settings] == [
        (decoding, size) for size in (4, 8) for decoding in ("static 1", "static 2", "dynamic 0.8", "dynamic 0.9")
    ]
    assert settings[1].unmasking == StaticUnmasking(steps_per_block=2)
    both = settings_of(["sequential", "entropy_bound"], [0.9], [3], [0.1, 1.0], [4])
    assert [s.decoding for s in both] == ["sequential 3", "entropy 0.1", "entropy 1"]
    with pytest.raises(ConfigError, match="3 does not divide block size 4"):
        settings_of(["static"], [0.9], [3], [0.1], [4])


def test_deviation_over_seeds_or_over_problems():
    seeds = row_of("student", "here", Setting(DynamicUnmasking(), 4), [evaluation(c) for c in (4, 5, 6)])
    assert (seeds.spread, seeds.mean["exact_match"]) == ("seeds", pytest.approx(0.5))
    assert seeds.std["exact_match"] == pytest.approx(0.1)  # n - 1
    assert "problems" not in seeds.std
    one = row(5, 6)
    assert one.spread == "problems"
    assert one.std["exact_match"] == pytest.approx((0.25 / 10) ** 0.5, rel=0.1)


def test_greedy_decoding_runs_once_whatever_the_seeds():
    assert list(Sweep([], 8, temperature=0.0, seeds=3).run_seeds) == [0]
    assert list(Sweep([], 8, temperature=1.0, seeds=3).run_seeds) == [0, 1, 2]


def test_pareto_front_holds_what_nothing_beats():
    best, fast, beaten, equal = row(9, 12), row(5, 3), row(4, 6), row(5, 6)
    assert pareto_front([beaten, best, fast, equal]) == [fast, best]


@pytest.mark.parametrize("width", [80, 140])
def test_table_fits_its_width(width):
    rows = [
        row(10, 6, Setting(DynamicUnmasking(threshold=0.95), 16)),
        row_of("teacher", "t", Setting(), [evaluation(9)]),
    ]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table(rows, width))
    text = console.export_text()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "dynamic 0.95" in text
    assert "resamples of the 10 problems" in text


def test_plot_is_a_png_that_is_not_blank(tmp_path):
    from matplotlib.image import imread

    rows = [row(c, s, Setting(DynamicUnmasking(threshold=c / 10), b)) for c, s, b in ((9, 6, 4), (7, 4, 4), (5, 3, 8))]
    plot([*rows, row_of("teacher", "t", Setting(), [evaluation(9, 12, 12)])], tmp_path / "p.png", "title")
    image = imread(tmp_path / "p.png")
    assert image.shape == (750, 1200, 4)
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 20


@pytest.mark.parametrize("temperature", [0, 1])
def test_one_command_sweeps_and_writes(tmp_path, monkeypatch, capsys, temperature):
    student = tmp_path / "student"
    monkeypatch.setattr(eval_command, "console", Console(width=80))

    def opdlm(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["opdlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr().err

    opdlm("convert", tiny_qwen3(tmp_path / "arlm"), student)
    output = tmp_path / "eval.json"
    opdlm(
        "eval", student, "--problems", HELDOUT, "--rule", "static", "--rule", "dynamic", "--threshold", 0,
        "--threshold", 0.5, "--block-size", 4, "--block-size", 8, "--seeds", 2, "--temperature", temperature,
        "--teacher", ARLM, "--count", 3, "--max-new-tokens", 8, "--output", output,
    )  # fmt: skip
    report = json.loads(output.read_text())
    rows = report["rows"]
    assert [(r["model"], r["decoding"], r["block_size"]) for r in rows] == [
        *(("student", d, b) for b in (4, 8) for d in ("static 1", "dynamic 0", "dynamic 0.5")),
        ("teacher", "AR", None),
    ]
    assert {len(r["runs"]) for r in rows} == {2 if temperature else 1}
    assert {r["spread"] for r in rows} == {"seeds" if temperature else "problems"}
    assert rows[-1]["mean"]["tokens_per_step"] == 1
    assert rows[1]["mean"]["tokens_per_step"] > rows[0]["mean"]["tokens_per_step"]
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert report["problems"] == {"path": HELDOUT, "count": 3}
    out = capsys.readouterr().out
    assert out.count("dynamic 0.5") == 2
    assert ("over 2 seeds" if temperature else "bootstrap") in out
