"""The learner's phase clock: phases add up to the time between the first mark and `take`."""

import time

import pytest
import torch

from deploy.monitoring.metrics import METRICS
from learner.phase_clock import PHASES, PhaseClock


def test_phases_add_up_to_the_time_and_a_phase_may_come_again():
    clock = PhaseClock(torch.device("cpu"))
    start = time.perf_counter()
    for phase, seconds in (("pack", 0.02), ("forward", 0.04), ("backward", 0.01), ("forward", 0.04)):
        clock.mark(phase)
        time.sleep(seconds)
    taken = clock.take()
    whole = time.perf_counter() - start
    assert list(taken) == list(PHASES)
    assert sum(taken.values()) == pytest.approx(whole, abs=2e-3)
    assert taken["forward"] >= 0.08 and taken["pack"] >= 0.02 and taken["backward"] >= 0.01
    assert taken["copy"] == taken["sums"] == taken["optimizer"] == 0.0


def test_what_lies_between_two_takes_or_under_no_phase_counts_nowhere():
    clock = PhaseClock(torch.device("cpu"))
    clock.mark("copy")
    assert clock.take()["copy"] < 0.01
    time.sleep(0.03)
    clock.mark("sums")
    clock.mark(None)
    time.sleep(0.03)
    assert sum(clock.take().values()) < 0.01


def test_every_phase_is_a_metric_of_the_run():
    assert {f"learner/{phase}_s" for phase in PHASES} <= METRICS.keys()
