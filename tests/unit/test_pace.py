"""When the run will end, by the batches that are through."""

import pytest

from deploy.monitoring.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("deploy.monitoring.pace.time.time", lambda: now[0])
    return now


def test_the_first_batch_counts_only_until_there_is_a_second(clock):
    """It compiles: 100 s, then 2 s each."""
    pace = Pace(10)
    pace.start()
    assert (pace.seconds_left, pace.expected_end) == (None, None)
    left = []
    for done, seconds in ((1, 100.0), (2, 2.0), (3, 2.0)):
        clock[0] += seconds
        pace.batch_done(done)
        left.append(pace.seconds_left)
    assert left == [900.0, 16.0, 14.0]
    assert pace.expected_end == clock[0] + 14.0


def test_a_resumed_run_counts_what_is_left_and_an_older_pace_is_forgotten(clock):
    pace = Pace(100, done=40)
    pace.start()
    for done in range(41, 91):
        clock[0] += 8.0 if done < 65 else 1.0
        pace.batch_done(done)
    assert pace.seconds_per_batch == 1.0
    assert pace.seconds_left == 10.0
