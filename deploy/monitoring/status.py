"""What a run says about itself in files, for the dashboard and for whoever looks into its folder.

`status.json` (replaced atomically, about once a second): state, batch, expected end, heartbeat, the actors.
`events.jsonl` (one object a line): what happened, with level `info`, `warning` or `error`.

Times are Unix seconds. `heartbeat` tells that the process lives, `progressed` that the control loop got somewhere.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from deploy.errors import Stopped

_WRITE_SECONDS = 1.0
_RECENT_BATCHES = 20  # the expected end is computed from these
_WORKING = {"rollout": "generating", "teacher": "computing targets"}
_ALONE = {"evaluating": "rollout", "saving": "learner"}  # the role that works in these states


class RunStatus:
    """Life cycle: entered for the run; the final state is that of the exception with which it is left, if any.

    The methods only note; a thread writes, so that the control loop never waits for the disk.
    """

    def __init__(self, run_dir: Path, name: str, batches: int, done: int = 0) -> None:
        """`done` of the `batches` were trained on before, where the run goes on from a checkpoint."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "status.json"
        self._events_path = run_dir / "events.jsonl"
        now = time.time()
        self._facts: dict[str, Any] = {
            "name": name,
            "state": "starting",
            "detail": "",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now,
            "progressed": now,
            "batch": done,
            "batches": batches,
            "batch_seconds": None,
            "expected_end": None,
        }
        self._actors: dict[str, dict[str, Any]] = {}
        self._batch_times: deque[float] = deque(maxlen=_RECENT_BATCHES + 1)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="status", daemon=True)

    def __enter__(self) -> RunStatus:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._facts["expected_end"] = None
        if error is None:
            self.state("finished")
        elif isinstance(error, (Stopped, KeyboardInterrupt)):
            self.state("stopped", str(error))
            self.event("stopped: " + str(error))
        else:
            self.state("failed", str(error))
            self.event(f"failed: {error}", "error")
        self._write()

    def state(self, state: str, detail: str = "") -> None:
        """What the run does now: starting, evaluating, training, saving; in the end finished, stopped or failed."""
        with self._lock:
            self._facts |= {"state": state, "detail": detail, "progressed": time.time()}
            for row in self._actors.values():
                row["state"] = state if row["role"] == _ALONE.get(state) else "waiting"

    def event(self, text: str, level: str = "info") -> None:
        """Append to events.jsonl; there are few of them."""
        with self._events_path.open("a") as file:
            file.write(json.dumps({"time": time.time(), "level": level, "text": text}) + "\n")

    def actors(self, ready: dict[str, dict[str, Any]]) -> None:
        """The actors that have come up: what each one's `ready` or `start` returned, by name."""
        with self._lock:
            for name, facts in ready.items():
                self._actors[name] = {
                    "name": name,
                    "role": facts["role"],
                    "node": facts["node"],
                    "pid": facts["pid"],
                    "weights_version": facts.get("weights_version"),
                    "state": "waiting",
                    "rate": None,
                    "last_heard": time.time(),
                    "restarts": 0,
                }

    def heard(self, name: str, **facts: Any) -> None:
        """An actor answered; `facts` are columns of its row. Another pid than before is a restart."""
        now = time.time()
        with self._lock:
            self._facts["progressed"] = now
            row = self._actors[name]
            row["restarts"] += facts.get("pid", row["pid"]) != row["pid"]
            row |= {**facts, "last_heard": now}

    def working(self, names: set[str], learner: str = "training") -> None:
        """The actors that have work now; all others wait. `learner` says what the ranks do."""
        with self._lock:
            for name, row in self._actors.items():
                state = _WORKING.get(row["role"], learner)
                row["state"] = state if name in names else "waiting"

    def batches_done(self, batch: int) -> None:
        """So many rollout batches are trained on; gives the expected end."""
        now = time.time()
        with self._lock:
            self._batch_times.append(now)
            self._facts |= {"batch": batch, "progressed": now}
            if len(self._batch_times) > 1:
                seconds = (now - self._batch_times[0]) / (len(self._batch_times) - 1)
                left = self._facts["batches"] - batch
                self._facts |= {"batch_seconds": seconds, "expected_end": now + seconds * left}

    def _keep_writing(self) -> None:
        while not self._stop.wait(_WRITE_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            text = json.dumps({**self._facts, "heartbeat": time.time(), "actors": list(self._actors.values())})
        replace_text(self._path, text)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
