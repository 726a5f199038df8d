"""Runs of the tiny preset whose processes are killed, stopped, made to fail and slowed down, by a seeded schedule.

    python -m tests.soak --faults 100 --parallel 4 --out soak.json
    python -m tests.soak --table --out soak.json

Every run has faults of its own, from its seed. Some runs have several nodes, in this machine's network or each in a
namespace of its own, a small disk, or vLLM as the teacher. Asserted of each: it completes, every trajectory is trained
exactly once, none is older than the staleness bound, memory and file handles of its processes do not grow, and at
staleness 0 the final weights equal those of a run without faults, bit for bit (on a CPU, the transformers teacher
reading one sequence a call). Results go into the JSON file after every run; the same command goes on from there until
there are as many faults as asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.roles import ROLES
from tests.small_disk import fill, small_disk
from tests.soak_network import NODE, Network, networks_allowed, raylets

BATCHES, PROMPTS, SAMPLES = 20, 8, 2
FAULTS = 10  # of a run
STILL_SECONDS = 300.0  # a run in which nothing happens for so long waits without a deadline
REPAIR_SECONDS = 120.0  # how long the next fault waits for the repair of the one before
SLOW_SECONDS, SLOW_FOR = 0.3, 4.0
FULL_SECONDS, CUT_SECONDS, SLOW_NETWORK_SECONDS = 6.0, 6.0, 10.0
PATIENCE = 2  # batches; a phase that has not come by then gives way to the one that is
DISK_MIB = 112
NODES_OF_RUN = {"raylets": 6, "network": 4}  # some spare
# of one process, from the median of a few batches, once the first are over, to that of its last few
WARM_BATCHES, MEDIAN_OF, GROWTH_MIB, GROWTH_HANDLES = 3, 3, 64.0, 24
ORDERS = "SOAK_ORDERS"  # environment: the folder with orders to the actors

ARGUMENTS = [
    "--pipeline.max_batches", str(BATCHES), "--rollout.prompts_per_batch", str(PROMPTS),
    "--rollout.samples_per_prompt", str(SAMPLES), "--rollout.stream_rows", "2", "--learner.warmup_batches", "1",
    "--pipeline.spool", "true", "--pipeline.checkpoint_every_batches", "2", "--evaluation.count", "8",
    "--evaluation.max_new_tokens", "16", "--evaluation.every_batches", "4", "--evaluation.teacher", "false",
    "--recovery.restarts", "1000",
]  # fmt: skip
WORK = {
    "loading": "loading models",
    "rollout": "generating",
    "teacher": "computing targets",
    "training": "training",
    "publishing": "publishing weights",
    "weights": "loading weights",
    "saving": "saving a checkpoint",
    "evaluating": "evaluating the student",
}
KINDS = ["kill", "kill", "kill", "stop", "pause", "raise", "slow"]
# where an actor takes the order to fail
RAISES = {
    "rollout": ["rollout", "weights", "evaluating", "loading"],
    "teacher": ["teacher", "loading"],
    "learner": ["training", "publishing", "saving", "loading"],
}
NETWORK_KINDS = ["network cut", "network slow", "network cut for seconds"]
# by the last digit of a seed
RUNS = ["vllm", "disk", "vllm", "loading", "", "", "vllm", "raylets", "network", "network"]
DRIVER_KINDS = ["driver killed", "checkpoint corrupted"]
NODES = "SOAK_NODES"  # environment: what is special about the run, its seed and its nodes


@dataclass
class Fault:
    """`seconds` from the fault to the first new work of what was replaced; None: nothing had to be. What was done again
    for it: rollout batches trained, trajectories asked of rollout actors."""

    kind: str
    role: str
    phase: str
    batch: int
    seconds: float | None = None
    batches_again: int = 0
    rollouts_again: int = 0


@dataclass(frozen=True)
class Plan:
    """A run: what is special about it (RUNS; often nothing), and its faults."""

    seed: int
    special: str
    staleness: int
    teachers: int
    faults: list[Fault]

    @property
    def nodes(self) -> int:
        return NODES_OF_RUN.get(self.special, 0)

    @property
    def backend(self) -> str:
        return "vllm" if self.special == "vllm" else "transformers"

    def arguments(self) -> list[str]:
        tokens = {"vllm": "2048", "transformers": "16"}[self.backend]  # one sequence a call, so that sums are the same
        cpus = "1" if self.special == "network" else "0.25"  # ranks on nodes of their own, or together
        return [
            *ARGUMENTS, "--pipeline.staleness", str(self.staleness), "--teacher.actors", str(self.teachers),
            "--teacher.backend", self.backend, "--teacher.max_batched_tokens", tokens, "--learner.resources.cpus", cpus,
        ]  # fmt: skip


def plan_of(seed: int, privileged: bool = True) -> Plan:
    """`privileged`: networks and disks may be made."""
    rng = random.Random(seed)
    special = RUNS[seed % 10]
    if special in ("network", "disk") and not privileged:
        special = ""
    staleness, teachers = (seed + seed // 10) % 2, 1 if special in ("network", "vllm") else rng.choice([1, 2])
    if special == "raylets":
        phases = ["rollout", "teacher", "training", "publishing", "weights"]
        faults = [Fault("raylet killed", "node", rng.choice(phases), batch) for batch in (1, 6, 11, 16)]
    elif special == "network":
        kinds = rng.sample(NETWORK_KINDS, len(NETWORK_KINDS))
        roles = rng.sample(["rollout", "teacher", "learner"], 3)
        phases = ["rollout", "teacher", "training", "publishing"]
        faults = [
            Fault(*pair, rng.choice(phases), batch) for *pair, batch in zip(kinds, roles, (2, 8, 14), strict=True)
        ]
    else:
        faults = [_fault(rng, special, batch) for batch in sorted(rng.sample(range(BATCHES - 1), FAULTS))]
    if special == "loading":
        faults = [Fault("kill", role, "loading", 0) for role in rng.sample(["rollout", "teacher", "learner"], 2)] + [
            Fault("driver killed", "driver", "loading", 0),
            *faults[3:],
        ]
    return Plan(seed, special, staleness, teachers, faults)


def _fault(rng: random.Random, special: str, batch: int) -> Fault:
    if special == "disk" and rng.random() < 0.4:
        return Fault("disk full", "driver", rng.choice(["rollout", "training", "saving"]), batch)
    if rng.random() < 0.1:
        return Fault(rng.choice(DRIVER_KINDS), "driver", rng.choice(["rollout", "training", "saving"]), batch)
    role, kind = rng.choice(["rollout", "rollout", "teacher", "learner"]), rng.choice(KINDS)
    if special == "loading" and rng.random() < 0.5:
        return Fault(rng.choice(["kill", "raise", "pause"]), role, "loading", batch)
    phases = [name for name in WORK if name != "loading"]
    return Fault(kind, role, rng.choice(RAISES[role] if kind == "raise" else phases), batch)


class SoakRun:
    """One run of the tiny preset and its faults."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.output = folder / "disk" if plan.special == "disk" else folder
        self.rng = random.Random(plan.seed)
        self.network = Network(plan.seed, plan.nodes)
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True)
        self.unbounded = False
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.begun: list[float] = []  # when, by fault
        self.samples: dict[tuple[str, int], list[tuple[float, int]]] = {}  # MiB and handles, by name and process
        self.sampled = -1

    def run(self) -> dict[str, Any]:
        begin = time.time()
        with ExitStack() as stack:
            if self.plan.special == "network":
                stack.enter_context(self.network.up())
            if self.plan.special == "disk":
                disk = stack.enter_context(small_disk(self.output, DISK_MIB))
                (self.folder / "spool").mkdir()  # what is asserted is read from there
                (disk / "tiny").mkdir()
                (disk / "tiny" / "spool").symlink_to(self.folder / "spool")
            stack.callback(self._kill_all)
            self._start()
            done: list[Fault] = []
            for fault in self.plan.faults:
                if self._reach(fault):
                    self.begun.append(time.time())
                    if self._do(fault):
                        done.append(fault)
                    else:
                        self.begun.pop()
            self._wait_until(lambda: False)
            while not self.unbounded and self._status() != 0 and self.starts < 8:  # it ended with a checkpoint
                self._start()
                self._wait_until(lambda: False)
            return self._result(done, time.time() - begin)

    def _start(self) -> None:
        self.starts += 1
        output = ["--output_dir", str(self.output), "--resume", "auto"]
        command = [sys.executable, "-m", "tests.soak", "drive", "tiny", *self.plan.arguments(), *output]
        environment = {
            **os.environ,
            ORDERS: str(self.orders),
            NODES: f"{self.plan.special} {self.plan.seed} {self.plan.nodes}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def _status(self) -> int | None:
        assert self.process
        return self.process.poll()

    def _kill_all(self) -> None:
        """The driver with its Ray; a killed driver cannot take it along."""
        if not self.process:
            return
        for process in _tree(self.process.pid):
            process.kill()
        for process in _with(ORDERS, str(self.orders)):
            process.kill()
        self.process.wait()

    def _seen(self) -> dict[str, Any]:
        """What the driver sees now: the work of the actors, their processes, and the batches done."""
        file = self.orders / "seen.json"
        return json.loads(file.read_text()) if file.exists() else {"working": {}, "pids": {}, "batches": 0}

    def _wait_until(self, reached: Any) -> bool:
        """Wait for a moment of the run; False when the run is over or stands still before."""
        before, since = "", time.monotonic()
        while self._status() is None:
            if reached():
                return True
            self._sample()
            log = self.output / "tiny" / "metrics.jsonl"
            now = f"{log.stat().st_size if log.exists() else 0} {(self.folder / 'log').stat().st_size}"
            if now != before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > STILL_SECONDS:
                self.unbounded = True
                return False
            time.sleep(0.005)
        return False

    def _sample(self) -> None:
        """Memory and file handles of the driver and its actors, after each batch."""
        assert self.process
        seen = self._seen()
        if seen["batches"] == self.sampled:
            return
        self.sampled = seen["batches"]
        actors = {name: pid for name, pid in seen["pids"].items() if name.rpartition("-")[0] in ROLES}
        for name, pid in {**actors, "driver": self.process.pid}.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                memory = process.memory_info()
                own = (memory.rss - memory.shared) / 2**20  # without what it sees of the object store
                self.samples.setdefault((name, pid), []).append((own, process.num_fds()))

    def _growth(self) -> dict[str, list[float]]:
        """MiB and handles that a process has more at its end, by role the most; of those that live long enough."""
        growth: dict[str, list[float]] = {}
        for (name, _), samples in self.samples.items():
            if len(samples) < WARM_BATCHES + 2 * MEDIAN_OF:
                continue
            first, last = samples[WARM_BATCHES:][:MEDIAN_OF], samples[-MEDIAN_OF:]
            more = [statistics.median(s[i] for s in last) - statistics.median(s[i] for s in first) for i in (0, 1)]
            role = name.rpartition("-")[0] or name
            growth[role] = [round(max(pair), 1) for pair in zip(more, growth.get(role, more), strict=True)]
        return growth

    def _reach(self, fault: Fault) -> bool:
        """The first moment from the fault's batch on at which any is in the phase; some phases are too short for some
        runs, then another."""

        def reached() -> bool:
            seen = self._seen()
            known = fault.role in ("driver", "node") or any(name.startswith(fault.role) for name in seen["pids"])
            works = {name for name, action in WORK.items() if action in seen["working"].values()}
            if fault.phase == "loading" and fault.batch:
                return bool(known and works and seen["batches"] >= fault.batch)
            if works and known and seen["batches"] >= fault.batch + PATIENCE and fault.kind != "raise":
                fault.phase = fault.phase if fault.phase in works else sorted(works)[0]
            wanted = fault.phase in works or (fault.kind == "raise" and bool(works))
            return known and seen["batches"] >= fault.batch and wanted

        return self._wait_until(reached)

    def _do(self, fault: Fault) -> bool:
        """Whether it could be done, and was repaired or needed no repair."""
        fault.batch = self._seen()["batches"]
        if fault.kind in DRIVER_KINDS:
            return self._end_driver(fault)
        if fault.kind == "disk full":
            return self._fill(fault)
        if fault.kind in NETWORK_KINDS:
            return self._disturb(fault)
        if fault.kind == "raylet killed":
            return self._kill_node(fault)
        names = self._victims(fault.role)
        if not names:
            return False
        name = self.rng.choice(names)
        if fault.kind == "raise":
            (self.orders / f"{name}.raise").write_text(fault.phase)
        if fault.phase == "loading" and fault.batch and not self._replaced(name, leave=fault.kind == "raise"):
            return False
        pid = self._seen()["pids"][name]
        if fault.kind == "raise":
            deadline = time.monotonic() + REPAIR_SECONDS
            order = self.orders / f"{name}.raise"
            self._wait_until(lambda: not order.exists() or time.monotonic() > deadline)
            if order.exists():
                order.unlink(missing_ok=True)
                return False
            self.begun[-1] = time.time()
        elif fault.kind == "slow":
            (self.orders / f"{name}.slow").touch()
            self._pass(SLOW_FOR)
            (self.orders / f"{name}.slow").unlink()
        else:
            try:
                os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            except ProcessLookupError:
                return False
        if fault.kind == "pause":
            self._pass(self.rng.choice([2, 4]))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if fault.kind in ("kill", "stop", "raise"):
            fault.seconds = self._await_repair(REPAIR_SECONDS)
        return True

    def _pass(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._wait_until(lambda: time.monotonic() > deadline)

    def _victims(self, role: str) -> list[str]:
        pids = self._seen()["pids"]
        return sorted(name for name, pid in pids.items() if name.startswith(role) and _alive(pid))

    def _replaced(self, name: str, leave: bool) -> bool:
        """Kill an actor, and wait for its replacement to load; `leave` that to what it was ordered to do."""
        before = self._seen()["pids"][name]
        with suppress(ProcessLookupError):
            os.kill(before, signal.SIGKILL)
        return leave or self._wait_until(lambda: self._seen()["pids"][name] != before)

    def _await_repair(self, most: float) -> float | None:
        start, deadline = self.begun[-1], time.monotonic() + most
        self._wait_until(lambda: self._repaired(start) or time.monotonic() > deadline)
        return self._repaired(start)

    def _end_driver(self, fault: Fault) -> bool:
        """Kill the driver, perhaps damage what it left, and start another."""
        self._kill_all()
        if fault.kind == "checkpoint corrupted" and not self._corrupt():
            fault.kind = "driver killed"
        rows, loading = self._rows(), fault.phase == "loading"
        self._start()
        self._wait_until(
            lambda: self._rows() > 0 and (loading or self._rows() != rows or self._seen()["batches"] > fault.batch)
        )
        fault.seconds = time.time() - self.begun[-1]
        return True

    def _fill(self, fault: Fault) -> bool:
        """A full disk for a while: it is repaired when what happens is written down again."""
        filling = fill(self.output)
        self._pass(FULL_SECONDS)
        rows = self._rows()
        filling.unlink()
        self._wait_until(lambda: self._rows() > rows)
        fault.seconds = time.time() - self.begun[-1]
        return True

    def _disturb(self, fault: Fault) -> bool:
        """The network of the node of an actor, for seconds or until its actors are replaced."""
        names = [name for name in self._victims(fault.role) if self._node_of(name) is not None]
        if not names:
            return False
        node = self._node_of(self.rng.choice(names))
        assert node is not None
        if fault.kind == "network slow":
            self.network.slow(node)
            self._pass(SLOW_NETWORK_SECONDS)
            self.network.quick(node)
            return True
        self.network.cut(node)
        if fault.kind == "network cut":
            fault.seconds = self._await_repair(1.5 * REPAIR_SECONDS)
        else:
            self._pass(CUT_SECONDS)
        self.network.join(node)
        return True

    def _node_of(self, name: str) -> int | None:
        with suppress(psutil.Error):
            return int(psutil.Process(self._seen()["pids"][name]).environ()[NODE])
        return None

    def _kill_node(self, fault: Fault) -> bool:
        """The raylet of a node with actors."""
        pids = self._seen()["pids"]
        parents = {psutil.Process(pid).ppid() for pid in pids.values() if _alive(pid)}
        names = [name for name in self._victims("node") if pids[name] in parents]
        if not names:
            return False
        with suppress(ProcessLookupError):
            os.kill(pids[self.rng.choice(names)], signal.SIGKILL)
        fault.seconds = self._await_repair(REPAIR_SECONDS / 2)
        return True

    def _repaired(self, start: float) -> float | None:
        """Seconds from a moment to the first repair after it."""
        times = [event["time"] for event in self._events() if "works again" in event["text"]]
        return next((moment - start for moment in times if moment > start), None)

    def _events(self) -> list[dict[str, Any]]:
        file = self.output / "tiny" / "events.jsonl"
        return (
            [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        )

    def _count_again(self, done: list[Fault]) -> None:
        """What was done again, to the fault before it."""

        def last(moment: float) -> Fault | None:
            return next((f for f, begun in reversed(list(zip(done, self.begun, strict=True))) if begun < moment), None)

        for event in self._events():
            fault, words = last(event["time"]), event["text"].split()
            if fault and "batches trained again" in event["text"]:
                fault.batches_again += int(words[words.index("batches") - 1])
            elif fault and event["text"].startswith("going on from") and fault.kind in DRIVER_KINDS:
                fault.batches_again += fault.batch - int(words[words.index("of") - 1])
        file = self.orders / "again"
        for line in file.read_text().splitlines() if file.exists() else ():
            moment, count = line.split()
            if fault := last(float(moment)):
                fault.rollouts_again += int(count)

    def _rows(self) -> int:
        file = self.output / "tiny" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def _corrupt(self) -> bool:
        """Change one byte of the newest checkpoint."""
        newest = sorted((self.output / "tiny" / "checkpoints").glob("batch-*/model.safetensors"))
        if len(newest) < 2:
            return False
        data = bytearray(newest[-1].read_bytes())
        data[len(data) // 2] ^= 1
        newest[-1].write_bytes(data)
        return True

    def _result(self, done: list[Fault], seconds: float) -> dict[str, Any]:
        run = self.output / "tiny"
        self._count_again(done)
        trained: Counter[tuple[int, int]] = Counter()
        too_old = 0
        for index in range(BATCHES):
            for key, version in _trained(run / "spool" / f"batch-{index:06d}.arrow"):
                trained[key] += 1
                too_old += version < index - self.plan.staleness
        aside = {e["text"].split()[1] for e in self._events() if "is set aside" in e["text"]}
        expected = {(o, s) for o in range(BATCHES * PROMPTS) for s in range(SAMPLES) if str(o) not in aside}
        model = run / "checkpoints" / "final" / "model.safetensors"
        failed = [e["text"] for e in self._events() if e["text"].startswith("failed:")]
        return {
            "seed": self.plan.seed,
            "special": self.plan.special,
            "staleness": self.plan.staleness,
            "teachers": self.plan.teachers,
            "backend": self.plan.backend,
            "completed": (run / "summary.json").exists(),
            "unbounded_wait": self.unbounded,
            "starts": self.starts,
            "failures": [text.replace(str(self.folder), "") for text in failed],
            "set_aside": sorted(aside),
            "lost": len(expected - set(trained)),
            "doubled": sum(count > 1 for count in trained.values()),
            "too_old": too_old,
            "weights": hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else None,
            "seconds": round(seconds, 1),
            "growth": self._growth(),
            "faults": [asdict(fault) | {"seconds": fault.seconds and round(fault.seconds, 1)} for fault in done],
        }


def _trained(spool: Path) -> Iterator[tuple[tuple[int, int], int]]:
    from common.trajectory import from_batch, read_spool

    if spool.exists():
        for batch in read_spool(spool):
            for t in from_batch(batch)[0]:
                yield (t.ordinal, t.sample), t.weights_version


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _with(variable: str, value: str) -> Iterator[psutil.Process]:
    """The processes with a variable in their environment that begins so."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(variable, "").startswith(value):
            yield process


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


# --- the run's own process ---


def drive(arguments: list[str]) -> None:
    """`opdlm train`, with actors that take orders, and a driver that writes down what it sees."""
    from actors import rollout
    from actors.teacher import actor as teacher
    from deploy import cli
    from deploy.monitoring.observer import Observers
    from deploy.rollout_batch import RolloutBatch
    from learner import rank
    from tests import soak_actors

    rollout.RolloutActor = soak_actors.Rollout  # type: ignore[misc]
    teacher.TeacherActor = soak_actors.Teacher  # type: ignore[misc]
    rank.as_remote.__defaults__ = (soak_actors.Rank,)
    file = Path(os.environ[ORDERS]) / "seen.json"
    seen: dict[str, Any] = {"working": {}, "pids": {}, "batches": 0}
    lock = threading.Lock()

    def write(**news: Any) -> None:
        with lock:
            seen.update(news)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(seen))
            partial.replace(file)

    active, heard, batch = Observers.active, Observers.heard, Observers.batch

    def active_too(self: Observers, working: Any, stages: Any = None) -> None:
        if dict(working) != seen["working"]:
            write(working=dict(working))
        active(self, working, stages)

    def heard_too(self: Observers, actor: str, facts: Any = None, **more: Any) -> None:
        pid = {**(facts or {}), **more}.get("pid")
        if pid and seen["pids"].get(actor) != pid:
            write(pids={**seen["pids"], actor: pid})
        heard(self, actor, facts, **more)

    def batch_too(self: Observers, metrics: Any, pace: Any = None) -> None:
        write(batches=int(metrics["batch"]) + 1)
        batch(self, metrics, pace)

    ask_again, ask_lost = RolloutBatch._ask_again, RolloutBatch.ask_lost

    def again(count: int) -> None:
        with (file.parent / "again").open("a") as out:
            out.write(f"{time.time()} {count}\n")

    def ask_again_too(self: RolloutBatch, share: Any) -> None:
        again(len(share.keys))
        ask_again(self, share)

    def ask_lost_too(self: RolloutBatch) -> bool:
        before = self.finished_rows
        lost = ask_lost(self)
        again(before - self.finished_rows)
        return lost

    Observers.active, Observers.heard, Observers.batch = active_too, heard_too, batch_too  # type: ignore[method-assign]
    RolloutBatch._ask_again, RolloutBatch.ask_lost = ask_again_too, ask_lost_too  # type: ignore[method-assign]
    sys.argv = ["opdlm", "train", *arguments]
    special, seed, count = os.environ[NODES].rsplit(" ", 2)
    if special == "raylets":
        sys.argv += ["--ray.address", raylets(int(count), lambda pids: write(pids={**seen["pids"], **pids}))]
    if special == "network":
        sys.argv += ["--ray.address", Network(int(seed), int(count)).start_ray(file.parent)]
    cli.main()


# --- all runs ---


def soak(faults: int, parallel: int, out: Path, first_seed: int, work: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": [], "reference": None}
    lock = threading.Lock()

    privileged = networks_allowed()

    def one(plan: Plan) -> dict[str, Any]:
        folder = work / f"seed-{plan.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        result = SoakRun(plan, folder).run()
        whole = result["completed"] and not (result["lost"] or result["doubled"] or result["unbounded_wait"])
        if whole and result["starts"] < 8:
            shutil.rmtree(folder)
        return result

    def work_off() -> None:
        while True:
            with lock:
                under_way = sum(len(r["faults"]) for r in results["runs"]) + FAULTS * len(begun - finished)
                if under_way >= faults:
                    return
                seed = max([first_seed - 1, *(r["seed"] for r in results["runs"]), *begun]) + 1
                begun.add(seed)
            result = one(plan_of(seed, privileged))
            if not result["completed"] and not result["faults"]:
                log = (work / f"seed-{seed}" / "log").read_text()[-2000:]
                raise RuntimeError(f"the run of seed {seed} did not get anywhere:\n{log}")
            with lock:
                finished.add(seed)
                results["runs"].append(result)
                if reference and reference.done():
                    results["reference"] = reference.result()
                summarize(results)
                write(results, out)
                print(_line(result), flush=True)

    begun: set[int] = set()
    finished: set[int] = set()
    with ThreadPoolExecutor(parallel + 1) as pool:
        reference = None if results["reference"] else pool.submit(one, Plan(-1, "", 0, 1, []))
        list(pool.map(lambda _: work_off(), range(parallel)))
        if reference:
            results["reference"] = reference.result()
    summarize(results)
    write(results, out)
    return results


def write(results: dict[str, Any], out: Path) -> None:
    """As JSON with a line for each run."""
    runs = ",\n  ".join(json.dumps(run) for run in results["runs"])
    facts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in results.items() if name != "runs"]
    out.write_text("{\n" + ",\n".join([*facts, f' "runs": [\n  {runs}\n ]']) + "\n}\n")


def summarize(results: dict[str, Any]) -> None:
    runs, reference = results["runs"], (results["reference"] or {}).get("weights")
    exact = [r for r in runs if r["staleness"] == 0 and r.get("backend") != "vllm"]
    same = [r for r in exact if not r["set_aside"] and r["completed"]]
    measured = [(role, more) for r in runs for role, more in r.get("growth", {}).items()]
    growth: dict[str, list[float]] = {}
    for role, more in measured:
        growth[role] = [max(pair) for pair in zip(more, growth.get(role, more), strict=True)]
    results |= {
        "faults": sum(len(r["faults"]) for r in runs),
        "completed_runs": sum(r["completed"] for r in runs),
        "all_runs": len(runs),
        "lost_ordinals": sum(r["lost"] for r in runs),
        "doubled_ordinals": sum(r["doubled"] for r in runs),
        "too_old": sum(r["too_old"] for r in runs),
        "unbounded_waits": sum(r["unbounded_wait"] for r in runs),
        "faults_with_vllm": sum(len(r["faults"]) for r in runs if r.get("backend") == "vllm"),
        "growth": growth,
        "growth_allowed": [GROWTH_MIB, GROWTH_HANDLES],
        "grown": sum(more[0] > GROWTH_MIB or more[1] > GROWTH_HANDLES for _, more in measured),
        "set_aside_runs": sum(bool(r["set_aside"]) for r in runs),
        "compared_runs": len(same) if reference else 0,
        "bit_equal_runs": sum(r["weights"] == reference for r in same) if reference else 0,
    }


def _line(result: dict[str, Any]) -> str:
    faults = ", ".join(
        f"{f['kind']} {f['role']} while {f['phase']}" + (f" {f['seconds']:.0f} s" if f["seconds"] else "")
        for f in result["faults"]
    )
    state = "completed" if result["completed"] else "NOT completed"
    return (
        f"seed {result['seed']} {result['special']}: {state} in {result['seconds']:.0f} s, staleness "
        f"{result['staleness']}, lost {result['lost']}, doubled {result['doubled']}, starts {result['starts']}; "
        f"{faults}"
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: fault, role and phase; how often, and the seconds to its repair. A fault without seconds needed none:
    nothing was replaced."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        for f in run["faults"]:
            groups.setdefault((f["kind"], f["role"], f["phase"]), []).append(f)
    lines = [
        "| fault | role | phase | tried | replaced | median s | worst s | batches again | rollouts again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (kind, role, phase), faults in sorted(groups.items()):
        known = [f["seconds"] for f in faults if f["seconds"] is not None]
        median, worst = (f"{statistics.median(known):.0f}", f"{max(known):.0f}") if known else ("", "")
        counted = [f for f in faults if "rollouts_again" in f]
        again = [f"{max(f[name] for f in counted)}" if counted else "" for name in ("batches_again", "rollouts_again")]
        cells = [kind, role, phase, str(len(faults)), str(len(known)), median, worst, *again]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["drive"]:
        drive(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="in all, with those in the file")
    parser.add_argument("--parallel", type=int, default=2, help="runs at the same time; each has about 7 processes")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--table", action="store_true", help="print the table of the file, and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="soak-"))
    results = soak(options.faults, options.parallel, options.out, options.seed, work)
    print(table(results))
    print(json.dumps({name: value for name, value in results.items() if name not in ("runs", "reference")}))
    bad = sum(results[name] for name in ("lost_ordinals", "doubled_ordinals", "unbounded_waits", "too_old", "grown"))
    unequal = results["bit_equal_runs"] < results["compared_runs"]
    sys.exit(bool(bad or unequal or results["completed_runs"] < results["all_runs"]))


if __name__ == "__main__":
    main()
