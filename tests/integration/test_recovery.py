"""Actors that die, hang or fail are replaced while the run goes on; every trajectory is trained exactly once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import psutil
import pytest
import ray

from common.config.file import load_config
from common.config.resources import Resources
from common.config.unmasking import StaticUnmasking
from common.prompts import Prompt
from common.ray_actor import as_ray_actor
from common.trajectory import TrajectoryMeta, batch_info, from_batch, read_spool, to_batch
from deploy import recovery
from deploy.checkpoints import RunState
from deploy.cluster import Pools
from deploy.dealing import ResponseLengths
from deploy.errors import RunError
from deploy.monitoring.observer import Note, Observer, Observers
from deploy.recovery import Supervisor
from deploy.remote_calls import RemoteCalls
from deploy.rollout_batch import RolloutBatch, RolloutsInFlight
from deploy.stop_signals import StopRequested, StopSignals
from tests.trajectories import random_trajectory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

BATCHES = 6


@pytest.fixture(scope="module")
def one_ray():
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


class FakeRollout:
    """Streams a random trajectory per key, one a record batch; `wrong` says what it does at ordinal 3."""

    def __init__(self, folder: Path, wrong: str) -> None:
        self.folder, self.wrong = folder, wrong
        self.dealt: SimpleQueue[list[Prompt] | None] = SimpleQueue()

    def rollout(self, prompts, limit, block_size, unmasking, batch=None, longest=0, keys=None, oldest=0):
        rng, more = np.random.default_rng(0), batch is not None
        while prompts or more:
            if not prompts:
                prompts = self.dealt.get()
                more = prompts is not None
                keys = {(p.ordinal, sample) for p in prompts or () for sample in range(2)}
                continue
            prompt, *prompts = prompts
            for key in sorted(k for k in keys if k[0] == prompt.ordinal):
                if prompt.ordinal == 3:
                    self.go_wrong()
                trajectory = random_trajectory(rng, 4, 8)
                trajectory.ordinal, trajectory.sample = key
                record_batch = to_batch([trajectory], TrajectoryMeta(4, 1, "fingerprint"))
                yield record_batch
                yield batch_info(record_batch)

    def go_wrong(self) -> None:
        mark = self.folder / self.wrong
        if self.wrong == "nothing" or (self.wrong.endswith("once") and mark.exists()):
            return
        mark.touch()
        if self.wrong == "hangs once":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)  # another thread may get the signal first, and this one would go on
        if self.wrong == "raises once":
            raise ValueError("a bad day")
        os._exit(1)

    @ray.method(concurrency_group="deals")
    def deal(self, batch, prompts):
        self.dealt.put(prompts)

    def stats(self):
        return {}


class FakeTeacher:
    """Passes record batches on, but dies once at ordinal 2 and at 6; each time the next cannot start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = len(list(folder.glob("teacher-*")))
        (folder / f"teacher-{number}").touch()
        if number in (1, 3):
            raise RuntimeError("no start")

    def annotate_with_info(self, record_batch):
        info = batch_info(record_batch)
        mark = self.folder / f"died-{info.keys[0][0]}"
        if mark.name in ("died-2", "died-6") and not mark.exists():
            mark.touch()
            time.sleep(1.0)  # others queue meanwhile
            os._exit(1)
        return record_batch, info


@dataclass
class Heard(Observer):
    notes: list[str]

    def note(self, note: Note) -> None:
        self.notes.append(note.text)


def rolled_out(
    folder: Path, wrong: str, restarts: int = 10, slots: int = 32, teacher: type | None = None
) -> tuple[RolloutBatch, list[str], Supervisor]:
    """A rollout batch of 8 prompts with two samples each, over two actors that are replaced when they fail."""
    actor_class = as_ray_actor(FakeRollout, Resources(cpus=0.5), concurrency_groups={"deals": 1})
    teacher_class = as_ray_actor(teacher, Resources(cpus=0.5)) if teacher else None

    def create(role: str, index: int):
        return teacher_class.remote(folder) if role == "teacher" else actor_class.remote(folder, wrong)

    pools = Pools([], [], [], create=create)
    pools.rollouts = [create("rollout", i) for i in range(2)]
    pools.teachers, pools.teacher_pools = ([create("teacher", 0)], [0]) if teacher else ([], [])
    config = load_config("tiny", [
        "--rollout.samples_per_prompt", "2", "--rollout.slots", str(slots), "--rollout.stream_rows", "1",
        "--recovery.restarts", str(restarts),
    ])  # fmt: skip
    heard = Heard([])
    with Observers([heard]) as observers:
        stop = StopSignals()
        supervisor = Supervisor(config, RunState(), observers, stop)
        supervisor.watch(pools)
        calls = RemoteCalls(300.0, observers, stop, supervisor)
        prompts = [Prompt(i, f"question {i}", np.zeros(3, np.int32)) for i in range(8)]
        in_flight = RolloutsInFlight()
        in_flight.append(RolloutBatch(0, prompts, config, 8, 4, StaticUnmasking(), pools, calls, ResponseLengths()))
        try:
            batch = in_flight.finish_oldest(calls)
        finally:
            pools.stop()
    keys = [key for info in batch.infos for key in info.keys]
    assert len(keys) == len(set(keys)) and set(keys) == batch.expected
    return batch, heard.notes, supervisor


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("slots", [1, pytest.param(32, marks=pytest.mark.long)])  # with few, they are dealt meanwhile
@pytest.mark.parametrize("wrong", ["nothing", "dies once", "raises once", "hangs once"])
def test_what_a_failed_actor_had_not_handed_over_is_asked_again(tmp_path, wrong, slots, monkeypatch):
    monkeypatch.setattr(recovery, "SILENT_SECONDS", 6.0)
    batch, notes, supervisor = rolled_out(tmp_path, wrong, slots=slots)
    assert len(batch.expected) == 16 and not batch.set_aside
    assert supervisor.state.restarts == {"rollout": int(wrong != "nothing"), "teacher": 0, "learner": 0}
    said = {
        "nothing": "",
        "dies once": " died while generating",
        "raises once": " failed while generating: ValueError('a bad day')",
        "hangs once": " gave no sign of life for",
    }
    assert said[wrong] in " ".join(notes)
    assert (" works again" in " ".join(notes)) == (wrong != "nothing")


@pytest.mark.usefixtures("one_ray")
def test_a_prompt_that_kills_actors_is_set_aside(tmp_path):
    batch, notes, supervisor = rolled_out(tmp_path, "always dies")
    assert [prompt.ordinal for prompt in batch.set_aside] == [3]
    assert {ordinal for ordinal, _ in batch.expected} == {0, 1, 2, 4, 5, 6, 7}
    assert supervisor.state.restarts["rollout"] == 4  # twice with others, twice alone
    assert "prompt 3 is set aside, because a process failed on it twice: 'question 3'" in notes


@pytest.mark.usefixtures("one_ray")
def test_no_prompt_is_blamed_for_work_that_had_not_begun(tmp_path):
    """A teacher that dies takes a queue with it, and a replacement that cannot start a queue as well: none of these
    record batches of one prompt each is to blame, but for the one that was under way."""
    batch, notes, supervisor = rolled_out(tmp_path, "nothing", teacher=FakeTeacher)
    assert supervisor.state.restarts["teacher"] == 4
    assert not batch.set_aside, notes
    assert len(batch.expected) == 16


class BrokenTeacher(FakeTeacher):
    def __init__(self, folder: Path) -> None:
        pass

    def annotate_with_info(self, record_batch):
        os._exit(1)


@pytest.mark.long
@pytest.mark.usefixtures("one_ray")
def test_a_run_whose_prompts_are_all_set_aside_ends(tmp_path):
    with pytest.raises(StopRequested):
        rolled_out(tmp_path, "nothing", restarts=100, teacher=BrokenTeacher)


@pytest.mark.usefixtures("one_ray")
def test_a_spent_budget_ends_the_run_with_the_first_cause(tmp_path):
    with pytest.raises(StopRequested):
        rolled_out(tmp_path, "always dies", restarts=1)


def test_the_first_cause_is_told_beside_the_last():
    stop = StopSignals()
    config = load_config("tiny", ["--recovery.restarts", "1"])
    supervisor = Supervisor(config, RunState(), Observers(), stop)
    supervisor._count("teacher", "teacher-0 died\nand a traceback")
    supervisor._count("rollout", "rollout-0 died")
    assert not stop.requested
    supervisor._count("rollout", "rollout-1 hangs")
    error = stop.error("saved")
    assert type(error) is RunError
    assert str(error) == (
        "rollout-1 hangs; the budget of 1 replaced rollout processes an hour (recovery.restarts) is spent. The first "
        "fault of the run was: teacher-0 died; saved"
    )


def test_a_learner_that_fails_on_the_same_batch_each_time_ends_the_run():
    state, stop = RunState(batches=6), StopSignals()
    supervisor = Supervisor(load_config("tiny"), state, Observers(), stop)
    for batches in (6, 6, 7, 7, 7):
        state.batches = batches
        supervisor.learner_failed("learner-1 died while training")
    with pytest.raises(RunError, match="failed on rollout batch 7 each time: learner-1 failed"):
        supervisor.learner_failed("learner-1 failed while training: ValueError()")


COMMAND = [
    sys.executable, "-m", "deploy", "train", "tiny", "--teacher.backend", "transformers", "--teacher.actors", "2",
    "--learner.resources.cpus", "0.25", "--evaluation.problems", "null", "--pipeline.max_batches", str(BATCHES),
    "--rollout.prompts_per_batch", "8", "--rollout.samples_per_prompt", "2", "--pipeline.spool", "true",
    "--learner.warmup_batches", "1",
]  # fmt: skip
FAULTS = [
    (0, "RolloutActor", signal.SIGKILL),
    (1, "LearnerRank", signal.SIGKILL),
    (2, "TeacherActor", signal.SIGKILL),
    (3, "RolloutActor", signal.SIGSTOP),
]


@pytest.mark.long
@pytest.mark.parametrize(("staleness", "transport"), [(0, "object_store"), (1, "object_store"), (1, "broadcast")])
def test_a_run_goes_on_without_its_killed_and_stopped_processes(tmp_path, staleness, transport):
    log, metrics = tmp_path / "log", tmp_path / "tiny" / "metrics.jsonl"
    command = [*COMMAND, "--output_dir", str(tmp_path), "--pipeline.staleness", str(staleness)]
    command += ["--publish.transport", transport]
    with log.open("w") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        for after, role, sent in FAULTS:
            while not metrics.exists() or len(metrics.read_text().splitlines()) < after + 1:
                assert run.poll() is None, log.read_text()
                time.sleep(0.05)
            victim = next(p for p in psutil.Process(run.pid).children(recursive=True) if role in "".join(p.cmdline()))
            os.kill(victim.pid, sent)
        assert run.wait(timeout=300) == 0, log.read_text()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["batch"] for row in rows] == list(range(BATCHES))
    trained = []
    for index in range(BATCHES):
        for batch in read_spool(tmp_path / "tiny" / "spool" / f"batch-{index:06d}.arrow"):
            for t in from_batch(batch)[0]:
                assert max(index - staleness, 0) <= t.weights_version <= index
                trained.append((t.ordinal, t.sample))
    assert sorted(trained) == [(ordinal, sample) for ordinal in range(8 * BATCHES) for sample in range(2)]
    actors = {a["name"]: a for a in json.loads((tmp_path / "tiny" / "status.json").read_text())["actors"]}
    assert sum(a["restarts"] for a in actors.values()) >= 1
