"""One run of the soak: its faults are done when their time has come, and what it then made is checked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from deploy.roles import ROLES
from tests.small_disk import fill, small_disk
from tests.soak_network import NODE, Network
from tests.soak_plan import (
    BATCHES,
    DRIVER_KINDS,
    MEDIAN_OF,
    NETWORK_KINDS,
    NODES,
    ORDERS,
    PROMPTS,
    SAMPLES,
    SLOW_FOR,
    WARM_BATCHES,
    WORK,
    Fault,
    Plan,
)

STILL_SECONDS = 300.0  # a run in which nothing happens for so long waits without a deadline
REPAIR_SECONDS = 120.0  # how long the next fault waits for the repair of the one before
FULL_SECONDS, CUT_SECONDS, SLOW_NETWORK_SECONDS = 6.0, 6.0, 10.0
PATIENCE = 2  # batches; a phase that has not come by then gives way to the one that is
DISK_MIB = 112


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
