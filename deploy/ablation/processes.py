"""The processes that an ablation starts: this program again, once for every run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from deploy.child_environment import child_environment
from deploy.errors import WorkerError
from deploy.stop_signals import StopRequested


class Processes:
    """Each run has its own process tree, so that nothing of one is left in the next.

    Life cycle: `run` from any number of threads at once; after `stop` there are no more.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, arguments: list[str], log: Path) -> None:
        """`opdlm ARGUMENTS`, until its end; its output is appended to `log`.

        Raises:
            WorkerError: it ended with an error; names the command and the log.
            StopRequested: it was stopped, or not begun.
        """
        with log.open("a") as output:
            with self._lock:
                if self.stopping:
                    raise StopRequested
                output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(arguments)}\n")
                output.flush()
                command = [sys.executable, "-m", "deploy", *arguments]
                child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment())
                self._running.add(child)
            status = child.wait()
            with self._lock:
                self._running.remove(child)
        if status and self.stopping:
            raise StopRequested
        if status:
            raise WorkerError(f"`opdlm {' '.join(arguments)}` ended with status {status}; its output is in {log}")

    def stop(self) -> None:
        """Ask all to end, by SIGTERM: a run writes a checkpoint first. The second call does nothing."""
        with self._lock:
            for child in () if self.stopping else self._running:
                child.terminate()
            self.stopping = True
