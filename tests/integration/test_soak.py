"""The short form of the soak: about ten faults in two runs, at staleness 0 and 1, beside one run without any."""

import json

import pytest

from tests import soak, soak_plan

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]


def test_runs_with_faults_lose_and_double_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(soak_plan, "FAULTS", 5)  # of a run
    out = tmp_path / "soak.json"
    results = soak.soak(faults=soak_plan.FAULTS + 1, parallel=1, out=out, first_seed=4, work=tmp_path)
    assert json.loads(out.read_text()) == results
    assert results["faults"] > soak_plan.FAULTS
    assert results["completed_runs"] == results["all_runs"] == 2
    assert {run["staleness"] for run in results["runs"]} == {0, 1}
    for bad in ("lost_ordinals", "doubled_ordinals", "too_old", "unbounded_waits", "set_aside_runs", "grown"):
        assert results[bad] == 0, results["runs"]
    assert results["bit_equal_runs"] == results["compared_runs"] == 1


def test_a_schedule_follows_from_its_seed():
    plans = [soak_plan.plan_of(seed) for seed in range(60)]
    assert plans[7] == soak_plan.plan_of(7) != plans[8]
    faults = [fault for plan in plans for fault in plan.faults]
    assert {fault.phase for fault in faults} == set(soak_plan.WORK)
    assert {fault.role for fault in faults} == {"rollout", "teacher", "learner", "driver", "node"}
    others = {"raylet killed", "disk full", *soak_plan.NETWORK_KINDS}
    assert {fault.kind for fault in faults} == {*soak_plan.KINDS, *soak_plan.DRIVER_KINDS, *others}
    assert {plan.special for plan in plans} == set(soak_plan.RUNS)
    without = {soak_plan.plan_of(seed, privileged=False).special for seed in range(20)}
    assert without == {"", "vllm", "loading", "raylets"}
