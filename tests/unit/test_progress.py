"""The progress display: a live one on a terminal, plain lines elsewhere, and the final table."""

import io

from rich.console import Console

from deploy.monitoring.metrics import METRICS
from deploy.monitoring.observer import Observers
from deploy.monitoring.progress import Progress, summary_table


def metrics(batch: int) -> dict[str, float]:
    return dict.fromkeys(METRICS, 2.0) | {
        "batch": batch,
        "kl": 0.125,
        "seconds/batch": 4.0,
        "weights_version": batch + 1,
    }


def shown(terminal: bool, batches: list[int]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal)
    with Observers([Progress(10, "demo", batches[0], console)], 10, batches[0]) as observers:
        observers.note("loading [models]")
        observers.note("saving", "detail")
        observers.training()
        observers.active({}, {"rollout": (3, 8)})
        for batch in batches:
            observers.batch(metrics(batch))
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = shown(False, [0, 1]).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("loading [models]")
    assert lines[1].startswith("batch 1/10  KL 0.1250  tokens/step 2.00  limit 2  lr 2.00e+00  version 1  staleness 2")
    assert "left 0:00:00" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_warnings_that_follow_from_the_metrics_reach_the_terminal():
    console = Console(file=io.StringIO(), width=200)
    with Observers([Progress(10, "demo", console=console)], 10) as observers:
        observers.batch(metrics(0) | {"kl": float("nan")})
    assert "batch 0: kl is nan" in console.file.getvalue()


def test_a_resumed_run_goes_on_counting():
    assert "batch 8/10" in shown(False, [7])


def test_live_display_shows_bars_stages_and_metrics():
    text = shown(True, [0, 1])
    for part in ("demo", "2/10", "rollout", "3/8", "publish", "50%", "KL 0.1250"):
        assert part in text


def test_summary_has_one_row_per_evaluated_model():
    one = {"exact_match": 0.987, "tokens_per_step": 3.456}
    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(summary_table({"student_init": one, "student": {"static": one, "dynamic": one}}))
    text = console.export_text()
    assert text.count("98.7%") == text.count("3.46") == 3
    assert "teacher" not in text
