"""What a run writes about itself: status, events, rollouts, warnings, shares of time."""

import json
import time

import numpy as np
import pytest

from deploy.errors import Stopped, WorkerError
from deploy.monitoring.health import Health
from deploy.monitoring.metrics import METRICS
from deploy.monitoring.observer import Observers
from deploy.monitoring.occupancy import Window
from deploy.monitoring.rollout_log import OLDER, RECENT, RolloutLog
from deploy.monitoring.status import RunStatus

READY = {
    "rollout-0": {"role": "rollout", "node": "10.0.0.1", "pid": 11, "weights_version": 0},
    "teacher-0": {"role": "teacher", "node": "10.0.0.2", "pid": 12},
    "learner-0": {"role": "learner", "node": "10.0.0.3", "pid": 13},
}


def read(folder) -> dict:
    return json.loads((folder / "status.json").read_text())


def wait_until(condition) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_status_of_a_run_from_start_to_end(tmp_path):
    with Observers([status := RunStatus(tmp_path, "r", batches=10)], 10) as observers:
        assert read(tmp_path)["state"] == "starting"
        for name, facts in READY.items():
            observers.heard(name, facts)
        observers.note("evaluating the teacher", state="evaluating")
        observers.active({"rollout-0": "evaluating"})
        assert [row["state"] for row in status._actors.values()] == ["evaluating", "waiting", "waiting"]
        observers.note("training", "detail", "training")
        observers.active({"rollout-0": "generating", "learner-0": "publishing weights"})
        observers.heard("rollout-0", weights_version=4, rate=100.0, pid=11)
        for batch in range(2):
            observers.batch(metrics(batch))
        first = read(tmp_path)["heartbeat"]
        wait_until(lambda: read(tmp_path)["heartbeat"] > first)
        facts = read(tmp_path)
        rows = {row["name"]: row for row in facts["actors"]}
        assert [rows[name]["state"] for name in READY] == ["generating", "waiting", "publishing weights"]
        assert rows["rollout-0"] | {"last_heard": None} == {
            "name": "rollout-0",
            "role": "rollout",
            "serves": "",
            "node": "10.0.0.1",
            "pid": 11,
            "weights_version": 4,
            "state": "generating",
            "rate": 100.0,
            "last_heard": None,
            "restarts": 0,
        }
        assert rows["teacher-0"]["weights_version"] is None
        assert (facts["state"], facts["detail"], facts["batch"]) == ("training", "training", 2)
        assert facts["expected_end"] == pytest.approx(time.time(), abs=30)
    assert read(tmp_path)["state"] == "finished"
    assert read(tmp_path)["expected_end"] is None
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events] == ["evaluating the teacher"], "details are kept nowhere"


def test_another_pid_is_a_restart(tmp_path):
    status = RunStatus(tmp_path, "r", batches=1)
    status.heard("rollout-0", READY["rollout-0"] | {"last_heard": 0.0})
    for pid in (11, 21, 21, 31):
        status.heard("rollout-0", {"pid": pid, "last_heard": 0.0})
    assert status._actors["rollout-0"]["restarts"] == 2


@pytest.mark.parametrize(
    ("error", "state", "level"),
    [(Stopped("stopped after 2 of 10 batches", 143), "stopped", "info"), (WorkerError("x died"), "failed", "error")],
)
def test_the_end_of_a_run_that_did_not_finish(tmp_path, error, state, level):
    with pytest.raises(type(error)), Observers([RunStatus(tmp_path, "r", batches=10)]):
        raise error
    assert (read(tmp_path)["state"], read(tmp_path)["detail"]) == (state, str(error))
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["level"] == level
    assert str(error) in event["text"]


def log_rollouts(folder, done: int, batches: range, rollout: dict) -> None:
    log = RolloutLog(folder, done, lambda: [rollout])
    for batch in batches:
        log._written = 0.0  # long ago
        log.batch({"batch": batch})


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]


def test_rollouts_are_bounded_recent_and_reach_back(tmp_path):
    log_rollouts(tmp_path, 0, range(200), {"tokens": ["x"]})
    batches = [rollout["batch"] for rollout in logged(tmp_path)]
    assert len(batches) == RECENT + OLDER
    assert batches[-RECENT:] == list(range(200 - RECENT, 200))
    assert batches[0] == 0
    assert batches == sorted(batches)
    # the older ones are spread out: no gap holds more than a third of the run
    assert np.diff(batches).max() < 200 / 3


def test_rollouts_are_asked_for_at_times_only(tmp_path):
    asked = []
    log = RolloutLog(tmp_path, 0, lambda: asked.append(1) or [{}])
    for batch in range(5):
        log.batch({"batch": batch})
    assert len(asked) == 1


def test_rollouts_of_a_resumed_run_go_on(tmp_path):
    log_rollouts(tmp_path, 0, range(4, 6), {})
    with (tmp_path / "trajectories.jsonl").open("a") as file:
        file.write('{"batch": 6, "tok')  # cut by a crash
    log_rollouts(tmp_path, 5, range(5, 6), {"again": True})
    assert logged(tmp_path) == [{"batch": 4}, {"batch": 5, "again": True}]


def metrics(batch: int, **changed: float) -> dict[str, float]:
    usual = {"batch": batch, "kl": 1.0, "loss": 1.0, "grad_norm": 1.0, "seconds/batch": 2.0}
    return dict.fromkeys(METRICS, 0.0) | usual | changed


def test_warnings_follow_from_the_metrics():
    health = Health()
    for batch in range(20):
        assert health.warnings(metrics(batch)) == []
    assert health.warnings(metrics(20, **{"seconds/batch": 30.0})) == ["batch 20: took 30.0 s, usually 2.0 s"]
    assert health.warnings(metrics(21, **{"seconds/batch": 30.0})) == []  # not twice within twenty batches
    (warning,) = health.warnings(metrics(22, kl=float("nan")))
    assert "kl is nan" in warning
    rises = [health.warnings(metrics(batch, kl=5.0)) for batch in range(23, 60)]
    assert any("KL rose: 5 nats per token" in line for lines in rises for line in lines)
    (warning,) = health.warnings(metrics(60, kl=5.0, grad_norm=50.0))
    assert "gradient norm 50" in warning


def covered_slowly(begin: int, end: int, spans: list[tuple[int, int]]) -> int:
    return sum(any(a <= t < b for a, b in spans) for t in range(begin, end))


def test_covered_time_equals_a_count_of_seconds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        begin, end = sorted(rng.integers(0, 50, 2).tolist())
        spans = [tuple(sorted(rng.integers(0, 60, 2).tolist())) for _ in range(rng.integers(0, 5))]
        assert Window(begin, end).covered(spans) == covered_slowly(begin, end, spans)


def test_shares_add_up_to_one():
    window = Window(100.0, 110.0)
    shares = window.shares("rollout", busy_seconds=[3.0, 5.0], phase_seconds=7.0)
    assert shares == pytest.approx({"busy/rollout": 0.4, "waiting/rollout": 0.3, "blocked/rollout": 0.3})
    # with staleness 1 the counters may tell of more than the window
    late = window.shares("teacher", busy_seconds=[12.0], phase_seconds=3.0)
    assert late == {"busy/teacher": 1.0, "waiting/teacher": 0.0, "blocked/teacher": 0.0}


def test_a_role_without_processes_has_no_shares():
    assert Window(100.0, 110.0).shares("teacher", busy_seconds=[], phase_seconds=3.0) == {}
