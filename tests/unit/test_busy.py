"""Spans of computing, and the share of a batch's time in which nobody computes."""

import time
from types import SimpleNamespace

import pytest

from common.busy import BusySpans, computes
from deploy.monitoring.occupancy import Window
from deploy.run_cost import RunCost


class Actor:
    """`seconds` have passed; the wall clock shows 1,000 more."""

    def __init__(self):
        self.seconds = 0.0
        self.spans = BusySpans(lambda: 1000.0 + self.seconds, lambda: self.seconds)

    @computes
    def load(self, value, fails=False):
        """Loads."""
        self.seconds += value
        if fails:
            raise ValueError("no")
        return value


def test_a_call_leaves_one_span_even_if_it_fails():
    actor = Actor()
    assert actor.load(3) == 3
    actor.seconds += 10  # nothing is computed
    with pytest.raises(ValueError, match="no"):
        actor.load(2, fails=True)
    actor.seconds += 10
    actor.spans.add(4)
    assert actor.spans.take() == [(1000, 1003), (1013, 1015), (1021, 1025)]
    assert actor.spans.take() == []


def test_a_clock_that_is_set_back_does_not_change_the_length_of_a_span():
    seconds, clock = iter([5.0, 7.0]), iter([100.0])
    spans = BusySpans(lambda: next(clock), lambda: next(seconds))
    with spans.measure():
        pass
    assert spans.take() == [(98.0, 100.0)]


def test_spans_are_in_unix_time():
    actor, before = SimpleNamespace(spans=BusySpans()), time.time()
    with actor.spans.measure():
        pass
    ((begin, end),) = actor.spans.take()
    assert begin <= end and before - 1 <= begin and end <= time.time() + 1


def test_the_decorated_method_keeps_its_name():
    assert (Actor.load.__name__, Actor.load.__doc__) == ("load", "Loads.")


def test_overhead_is_what_no_actor_covers():
    window = Window(100.0, 110.0)
    assert window.overhead([]) == 1.0
    assert window.overhead([(90.0, 103.0), (102.0, 104.0), (106.0, 120.0)]) == pytest.approx(0.2)
    assert window.overhead([(0.0, 200.0)]) == 0.0
    assert Window(5.0, 5.0).overhead([]) == 0.0


def test_slots_in_use_are_counted_from_the_end_of_the_rollouts_before():
    from deploy import batch_metrics

    config = SimpleNamespace(rollout=SimpleNamespace(slots=4))
    metrics = batch_metrics.BatchMetrics(config, None, None, 1, RunCost(0, 0, 0))
    before = {"rollout-0": 30.0, "rollout-1": 50.0}
    metrics.previous_stats = {
        "rollout-0": {"slot_seconds": 50.0}, "rollout-1": {"slot_seconds": 62.0}, "teacher-0": {},
    }  # fmt: skip
    batch = SimpleNamespace(started=100.0, rollouts_done=108.0)
    assert metrics._slots_in_use(batch, before) == pytest.approx((20 + 12) / (2 * 4 * 8))
    later = SimpleNamespace(started=104.0, rollouts_done=118.0)  # admitted while the one before was under way
    assert metrics._slots_in_use(later, before) == pytest.approx((20 + 12) / (2 * 4 * 10))
    metrics.previous_stats["rollout-0"] = {"slot_seconds": 3.0}  # it was restarted
    again = SimpleNamespace(started=118.0, rollouts_done=128.0)
    assert metrics._slots_in_use(again, before) == pytest.approx((3 + 12) / (2 * 4 * 10))


def test_metrics_join_the_spans_of_all_roles(monkeypatch):
    """Answers that are queued behind rollouts come later, and only where rollouts overlap training."""
    from deploy import batch_metrics

    answers = {"a": [(100.0, 104.0)], "b": [(104.0, 109.0)], "late": [(111.0, 115.0)]}
    calls = SimpleNamespace(wait=lambda refs, *_, **__: [{"spans": answers[ref]} for ref in refs])
    monkeypatch.setattr(batch_metrics.ray, "wait", lambda refs, **_: ([r for r in refs if r != "late"], ["late"]))
    pipeline = SimpleNamespace(staleness=1, stage_timeout_s=1.0)
    metrics = batch_metrics.BatchMetrics(SimpleNamespace(pipeline=pipeline), None, calls, 1, RunCost(0, 0, 0))
    metrics._asked = {"a": "rollout-0", "b": "learner-0", "late": "rollout-1"}
    done = SimpleNamespace(rollouts_done=100.0, started=90.0, actor_stats={})
    assert metrics._overhead([done], Window(100.0, 110.0)) == pytest.approx(0.1)
    assert metrics._asked == {"late": "rollout-1"}
    running = SimpleNamespace(rollouts_done=0.0, started=116.0, actor_stats={})
    monkeypatch.setattr(batch_metrics.ray, "wait", lambda refs, **_: (refs, []))
    assert metrics._overhead([done, running], Window(110.0, 120.0)) == pytest.approx(0.2)
