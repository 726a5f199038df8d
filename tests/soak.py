"""Runs of the tiny preset whose processes are killed, stopped, made to fail and slowed down, by a seeded schedule.

    python -m tests.soak --faults 100 --parallel 4 --out soak.json

Every run has faults of its own, from its seed. Asserted of each: it completes, every trajectory is trained exactly
once, none is older than the staleness bound, and at staleness 0 the final weights equal those of a run without faults,
bit for bit (on a CPU, the transformers teacher reading one sequence a call). Results go into the JSON file after every
run; the same command goes on from there until there are as many faults as asked for.
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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

BATCHES, PROMPTS, SAMPLES = 20, 8, 2
FAULTS = 8  # of a run
STILL_SECONDS = 300.0  # a run in which nothing happens for so long waits without a deadline
REPAIR_SECONDS = 120.0  # how long the next fault waits for the repair of the one before
SLOW_SECONDS, SLOW_FOR = 0.3, 4.0
ORDERS = "SOAK_ORDERS"  # environment: the folder with orders to the actors

ARGUMENTS = [
    "--teacher.backend", "transformers", "--teacher.max_batched_tokens", "16", "--learner.resources.cpus", "0.25",
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
DRIVER_KINDS = ["driver killed", "checkpoint corrupted"]
NODES = "SOAK_NODES"  # environment: the run's Ray has so many nodes on this machine, beside the head


@dataclass
class Fault:
    """`seconds` from the fault to the first new work of what was replaced; None: nothing had to be."""

    kind: str
    role: str
    phase: str
    batch: int
    seconds: float | None = None


def schedule(seed: int) -> tuple[int, int, list[Fault]]:
    """Staleness, number of teachers and faults of a run."""
    rng = random.Random(seed)
    teachers = rng.choice([1, 2])
    faults = []
    if nodes_of(seed):
        phases = ["rollout", "teacher", "training", "publishing", "weights"]
        return (
            seed % 2,
            teachers,
            [Fault("raylet killed", "node", rng.choice(phases), batch) for batch in (1, 6, 11, 16)],
        )
    for batch in sorted(rng.sample(range(BATCHES), FAULTS)):
        if rng.random() < 0.12:
            faults.append(Fault(rng.choice(DRIVER_KINDS), "driver", rng.choice(["rollout", "training"]), batch))
            continue
        role = rng.choice(["rollout", "rollout", "teacher", "learner"])
        phase = rng.choice([name for name in WORK if name != "loading" or batch == 0])
        faults.append(Fault(rng.choice(KINDS), role, phase, batch))
    return seed % 2, teachers, faults


def nodes_of(seed: int) -> int:
    """Of every seven runs one loses nodes."""
    return 6 if seed % 7 == 3 else 0


class SoakRun:
    """One run of the tiny preset and its faults."""

    def __init__(self, seed: int, folder: Path, faults: list[Fault], staleness: int, teachers: int) -> None:
        self.seed, self.folder, self.faults = seed, folder, faults
        self.rng = random.Random(seed)
        self.staleness, self.teachers = staleness, teachers
        self.orders = folder / "orders"
        self.orders.mkdir(parents=True)
        self.unbounded = False
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> dict[str, Any]:
        begin = time.time()
        self._start()
        done: list[Fault] = []
        try:
            for fault in self.faults:
                if self._reach(fault) and self._do(fault):
                    done.append(fault)
            self._wait_until(lambda: False)
            while not self.unbounded and self._status() != 0 and self.starts < 8:  # it ended with a checkpoint
                self._start()
                self._wait_until(lambda: False)
        finally:
            self._kill_all()
        return self._result(done, time.time() - begin)

    def _start(self) -> None:
        self.starts += 1
        command = [
            sys.executable, "-m", "tests.soak", "drive", "tiny", *ARGUMENTS, "--output_dir", str(self.folder),
            "--pipeline.staleness", str(self.staleness), "--teacher.actors", str(self.teachers), "--resume", "auto",
        ]  # fmt: skip
        environment = {
            **os.environ,
            ORDERS: str(self.orders),
            NODES: str(nodes_of(self.seed)),
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
        assert self.process
        for process in _tree(self.process.pid):
            process.kill()
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get(ORDERS) == str(self.orders):
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
            log = self.folder / "tiny" / "metrics.jsonl"
            now = f"{log.stat().st_size if log.exists() else 0} {(self.folder / 'log').stat().st_size}"
            if now != before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > STILL_SECONDS:
                self.unbounded = True
                return False
            time.sleep(0.005)
        return False

    def _reach(self, fault: Fault) -> bool:
        """The first moment from the fault's batch on at which the victim's role, or any, is in the phase."""
        action = WORK[fault.phase]

        def reached() -> bool:
            seen = self._seen()
            known = fault.role == "driver" or any(name.startswith(fault.role) for name in seen["pids"])
            return known and seen["batches"] >= fault.batch and action in seen["working"].values()

        return self._wait_until(reached)

    def _do(self, fault: Fault) -> bool:
        """Whether it could be done, and was repaired or needed no repair."""
        assert self.process
        seen = self._seen()
        fault.batch = seen["batches"]
        start = time.time()
        if fault.role == "driver":
            self._kill_all()
            if fault.kind == "checkpoint corrupted" and not self._corrupt():
                fault.kind = "driver killed"
            rows = self._rows()
            self._start()
            self._wait_until(
                lambda: self._rows() > 0 and (self._rows() != rows or self._seen()["batches"] > fault.batch)
            )
            fault.seconds = time.time() - start
            return True
        names = sorted(n for n, pid in seen["pids"].items() if n.startswith(fault.role) and _alive(pid))
        if fault.role == "node":  # one with actors
            parents = {psutil.Process(pid).ppid() for pid in seen["pids"].values() if _alive(pid)}
            names = [name for name in names if seen["pids"][name] in parents]
        if not names:
            return False
        name = self.rng.choice(names)
        if fault.role == "node":
            with suppress(ProcessLookupError):
                os.kill(seen["pids"][name], signal.SIGKILL)
            deadline = time.monotonic() + REPAIR_SECONDS / 2
            self._wait_until(lambda: self._repaired(start) or time.monotonic() > deadline)
            fault.seconds = self._repaired(start)
        elif fault.kind == "raise":
            (self.orders / f"{name}.raise").touch()
        elif fault.kind == "slow":
            (self.orders / f"{name}.slow").touch()
            time.sleep(SLOW_FOR)
            (self.orders / f"{name}.slow").unlink()
        else:
            try:
                os.kill(seen["pids"][name], signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            except ProcessLookupError:
                return False
        if fault.kind == "pause":
            time.sleep(self.rng.choice([2, 4]))
            os.kill(seen["pids"][name], signal.SIGCONT)
        if fault.kind in ("kill", "stop", "raise"):
            deadline = time.monotonic() + REPAIR_SECONDS
            self._wait_until(lambda: self._repaired(start) or time.monotonic() > deadline)
            fault.seconds = self._repaired(start)
        return True

    def _repaired(self, start: float) -> float | None:
        """Seconds from a moment to the first repair after it."""
        times = [event["time"] for event in self._events() if "works again" in event["text"]]
        return next((moment - start for moment in times if moment > start), None)

    def _events(self) -> list[dict[str, Any]]:
        file = self.folder / "tiny" / "events.jsonl"
        return (
            [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
        )

    def _rows(self) -> int:
        file = self.folder / "tiny" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def _corrupt(self) -> bool:
        """Change one byte of the newest checkpoint."""
        newest = sorted((self.folder / "tiny" / "checkpoints").glob("batch-*/model.safetensors"))
        if len(newest) < 2:
            return False
        data = bytearray(newest[-1].read_bytes())
        data[len(data) // 2] ^= 1
        newest[-1].write_bytes(data)
        return True

    def _result(self, done: list[Fault], seconds: float) -> dict[str, Any]:
        run = self.folder / "tiny"
        trained: Counter[tuple[int, int]] = Counter()
        too_old = 0
        for index in range(BATCHES):
            for key, version in _trained(run / "spool" / f"batch-{index:06d}.arrow"):
                trained[key] += 1
                too_old += version < index - self.staleness
        aside = {e["text"].split()[1] for e in self._events() if "is set aside" in e["text"]}
        expected = {(o, s) for o in range(BATCHES * PROMPTS) for s in range(SAMPLES) if str(o) not in aside}
        model = run / "checkpoints" / "final" / "model.safetensors"
        failed = [e["text"] for e in self._events() if e["text"].startswith("failed:")]
        return {
            "seed": self.seed,
            "staleness": self.staleness,
            "teachers": self.teachers,
            "completed": (run / "summary.json").exists(),
            "unbounded_wait": self.unbounded,
            "starts": self.starts,
            "failures": failed,
            "set_aside": sorted(aside),
            "lost": len(expected - set(trained)),
            "doubled": sum(count > 1 for count in trained.values()),
            "too_old": too_old,
            "weights": hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else None,
            "seconds": round(seconds, 1),
            "faults": [asdict(fault) for fault in done],
        }


def _trained(spool: Path) -> Iterator[tuple[tuple[int, int], int]]:
    from common.trajectory import from_batch, read_spool

    if spool.exists():
        for batch in read_spool(spool):
            for t in from_batch(batch)[0]:
                yield (t.ordinal, t.sample), t.weights_version


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


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
    from learner import rank
    from tests import soak_actors

    rollout.RolloutActor = soak_actors.Rollout  # type: ignore[misc]
    teacher.TeacherActor = soak_actors.Teacher  # type: ignore[misc]
    rank.LearnerRank = soak_actors.Rank  # type: ignore[misc]
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

    Observers.active, Observers.heard, Observers.batch = active_too, heard_too, batch_too  # type: ignore[method-assign]
    sys.argv = ["opdlm", "train", *arguments]
    if count := int(os.environ[NODES]):
        sys.argv += ["--ray.address", _cluster(count, lambda pids: write(pids={**seen["pids"], **pids}))]
    cli.main()


def _cluster(count: int, tell: Any) -> str:
    """A Ray of several nodes on this machine; some are spare. Returns its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 * 2**20})
    size = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
    nodes = [cluster.add_node(**size) for _ in range(count)]
    tell({f"node-{i}": node.all_processes["raylet"][0].process.pid for i, node in enumerate(nodes)})
    return str(cluster.address)


# --- all runs ---


def soak(faults: int, parallel: int, out: Path, first_seed: int, work: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": [], "reference": None}
    lock = threading.Lock()

    def one(seed: int, staleness: int, teachers: int, schedule_of: list[Fault]) -> dict[str, Any]:
        folder = work / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        result = SoakRun(seed, folder, schedule_of, staleness, teachers).run()
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
            result = one(seed, *schedule(seed))
            if not result["completed"] and not result["faults"]:
                log = (work / f"seed-{seed}" / "log").read_text()[-2000:]
                raise RuntimeError(f"the run of seed {seed} did not get anywhere:\n{log}")
            with lock:
                finished.add(seed)
                results["runs"].append(result)
                if reference and reference.done():
                    results["reference"] = reference.result()
                summarize(results)
                out.write_text(json.dumps(results, indent=1) + "\n")
                print(_line(result), flush=True)

    begun: set[int] = set()
    finished: set[int] = set()
    with ThreadPoolExecutor(parallel + 1) as pool:
        reference = None if results["reference"] else pool.submit(one, -1, 0, 1, [])
        list(pool.map(lambda _: work_off(), range(parallel)))
        if reference:
            results["reference"] = reference.result()
    summarize(results)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def summarize(results: dict[str, Any]) -> None:
    runs, reference = results["runs"], (results["reference"] or {}).get("weights")
    same = [r for r in runs if r["staleness"] == 0 and not r["set_aside"] and r["completed"]]
    results |= {
        "faults": sum(len(r["faults"]) for r in runs),
        "completed_runs": sum(r["completed"] for r in runs),
        "all_runs": len(runs),
        "lost_ordinals": sum(r["lost"] for r in runs),
        "doubled_ordinals": sum(r["doubled"] for r in runs),
        "too_old": sum(r["too_old"] for r in runs),
        "unbounded_waits": sum(r["unbounded_wait"] for r in runs),
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
        f"seed {result['seed']}: {state} in {result['seconds']:.0f} s, staleness {result['staleness']}, lost "
        f"{result['lost']}, doubled {result['doubled']}, starts {result['starts']}; {faults}"
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: fault, role and phase; how often, and the seconds to its repair."""
    groups: dict[tuple[str, str, str], list[float | None]] = {}
    for run in results["runs"]:
        for f in run["faults"]:
            groups.setdefault((f["kind"], f["role"], f["phase"]), []).append(f["seconds"])
    lines = [
        "| fault | role | phase | tried | repaired | median s | worst s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (kind, role, phase), seconds in sorted(groups.items()):
        known = [s for s in seconds if s is not None]
        median, worst = (f"{statistics.median(known):.1f}", f"{max(known):.1f}") if known else ("", "")
        lines.append(f"| {kind} | {role} | {phase} | {len(seconds)} | {len(known)} | {median} | {worst} |")
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
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="soak-"))
    results = soak(options.faults, options.parallel, options.out, options.seed, work)
    print(table(results))
    print(json.dumps({name: value for name, value in results.items() if name not in ("runs", "reference")}))
    bad = results["lost_ordinals"] + results["doubled_ordinals"] + results["unbounded_waits"] + results["too_old"]
    sys.exit(bool(bad or results["completed_runs"] < results["all_runs"]))


if __name__ == "__main__":
    main()
