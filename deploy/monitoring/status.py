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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from deploy.errors import Stopped
from deploy.files import LineWriter, drop_half_line, replace_text
from deploy.monitoring.observer import Note, Observer
from deploy.monitoring.pace import Pace

_WRITE_SECONDS = 1.0


class RunStatus(Observer):
    """Life cycle: entered for the run; the final state is that of the exception with which it is left, if any.

    The calls only note; a thread writes, so that the control loop never waits for the disk.
    """

    def __init__(self, run_dir: Path, name: str, batches: int, done: int = 0) -> None:
        """`done` of the `batches` were trained on before, where the run goes on from a checkpoint."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "status.json"
        self._events_path = run_dir / "events.jsonl"
        self._events = LineWriter(self._events_path)
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
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="status", daemon=True)

    def __enter__(self) -> Self:
        drop_half_line(self._events_path)  # what a crash has left
        self._write()
        self._thread.start()
        return self

    def note(self, note: Note) -> None:
        """Its state and text are shown until the next; unless it is a detail it goes to events.jsonl too."""
        with self._lock:
            self._facts["progressed"] = time.time()
            if note.state:
                self._facts |= {"state": note.state, "detail": note.text}
        if note.level != "detail":
            self._events.append(json.dumps({"time": time.time(), "level": note.level, "text": note.text}))

    def heard(self, actor: str, facts: Mapping[str, Any]) -> None:
        """The first answer of an actor makes its row; another pid than before is a restart."""
        with self._lock:
            self._facts["progressed"] = facts["last_heard"]
            row = self._actors.setdefault(actor, _new_row(actor))
            row["restarts"] += facts.get("pid", row["pid"]) != row["pid"] is not None
            row |= {name: value for name, value in facts.items() if name in row}

    def active(self, working: Mapping[str, str], stages: Mapping[str, tuple[int, int]]) -> None:
        with self._lock:
            for name, row in self._actors.items():
                row["state"] = working.get(name, "waiting")

    def batch(self, metrics: Mapping[str, Any], pace: Pace) -> None:
        with self._lock:
            self._facts |= {
                "batch": pace.done,
                "progressed": time.time(),
                "batch_seconds": pace.seconds_per_batch,
                "expected_end": pace.expected_end,
            }

    def end(self, error: BaseException | None) -> None:
        self._stop.set()
        self._thread.join()
        self._facts["expected_end"] = None
        self.active({}, {})
        if error is None:
            self._facts |= {"state": "finished", "detail": ""}
        elif isinstance(error, (Stopped, KeyboardInterrupt)):
            self._facts |= {"state": "stopped", "detail": str(error)}
            self._end_with(Note(f"stopped: {error}"))
        else:
            self._facts |= {"state": "failed", "detail": str(error)}
            self._end_with(Note(f"failed: {error}", "error"))
        self._write()

    def _end_with(self, note: Note) -> None:
        with suppress(OSError):  # what ended the run counts, and is told by its last status
            self.note(note)

    def _keep_writing(self) -> None:
        while not self._stop.wait(_WRITE_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            text = json.dumps({**self._facts, "heartbeat": time.time(), "actors": list(self._actors.values())})
        with suppress(OSError):  # a full disk: there is a newer status in a second
            replace_text(self._path, text, sync=False)


def _new_row(actor: str) -> dict[str, Any]:
    return {
        "name": actor,
        "role": "",
        "serves": "",  # which domains, of several teachers
        "node": "",
        "pid": None,
        "weights_version": None,
        "state": "waiting",
        "rate": None,
        "last_heard": None,
        "restarts": 0,
    }
