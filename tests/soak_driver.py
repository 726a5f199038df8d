"""The own process of a run of the soak."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.soak_network import Network, raylets
from tests.soak_plan import NODES, ORDERS


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
