"""The run's log: JSON lines and TensorBoard events say the same, under the registry's names."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.monitoring.metrics import METRICS
from deploy.monitoring.run_log import RunLog


def metrics(batch: int) -> dict[str, float]:
    return {name: batch + i / 64 for i, name in enumerate(METRICS) if name != "time"} | {"batch": batch}


def test_json_lines_and_events_agree(tmp_path):
    with RunLog(tmp_path) as log:
        for batch in range(3):
            log.batch(metrics(batch))
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == batch + 1  # readable at once
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [set(METRICS)] * 3

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"kl", "seconds/publish", "bytes/weights", "rollout/tokens_per_second"} <= set(tags)
    for tag in tags:
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(n, lines[n][tag]) for n in range(3)]


def test_unknown_and_missing_names_are_refused(tmp_path):
    with RunLog(tmp_path) as log:
        with pytest.raises(KeyError, match="spped"):
            log.batch(metrics(0) | {"spped": 1.0})
        with pytest.raises(KeyError, match="kl"):
            log.batch({name: value for name, value in metrics(0).items() if name != "kl"})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_optional_metrics_are_null_in_rows_and_absent_from_events(tmp_path):
    optional = {name for name, spec in METRICS.items() if spec.optional}
    assert {"eval/exact_match", "eval/tokens_per_step", "seconds/evaluation"} <= optional
    assert not {"kl", "epoch"} & optional
    with RunLog(tmp_path) as log:
        log.batch({name: value for name, value in metrics(0).items() if name not in optional})
        log.batch(metrics(1))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert list(first) == list(second) == list(METRICS)
    assert all((first[name] is None) == (name in optional) for name in METRICS)
    assert None not in second.values()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/exact_match")] == [1]


def test_a_log_goes_on_where_it_was(tmp_path):
    for batch in range(2):
        with RunLog(tmp_path, batch) as log:
            log.batch(metrics(batch))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_every_metric_says_what_it_means():
    assert all(spec.meaning for spec in METRICS.values())


def test_batches_that_are_trained_again_stand_once_in_the_events(tmp_path):
    for first, last in ((0, 4), (2, 6)):  # killed after batch 4, resumed from the checkpoint after batch 1
        with RunLog(tmp_path, first) as log:
            for batch in range(first, last + 1):
                log.batch(metrics(batch) | {"kl": 100.0 * first + batch})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(0, 0), (1, 1), *((n, 200 + n) for n in range(2, 7))]


def test_a_cut_keeps_the_first_batches_and_drops_half_a_last_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"batch": batch}) + "\n" for batch in range(4)]
    for first, kept in ((2, rows[:2]), (4, rows)):
        file.write_text("".join(rows) + '{"batch": 4, "lo')
        before = file.stat().st_ino
        with RunLog(tmp_path, first):
            assert file.read_text() == "".join(kept)
        assert file.stat().st_ino != before, "replaced as a whole: a reader never sees a part"
        assert not list(tmp_path.glob(".*partial"))
