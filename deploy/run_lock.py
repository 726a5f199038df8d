"""One process works on a run at a time: `run.lock` in its folder says which.

A lock of the operating system would be simpler, but file systems that clusters share do not all keep one between
hosts. So the file is made in a way that only one of two succeeds at, and its time is renewed while its owner lives.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self
from uuid import uuid4

import psutil

from common.config.errors import ConfigError
from deploy.errors import RunError

FILE = "run.lock"
_RENEW_SECONDS = 5.0
_GUARD_SECONDS = 0.05
_STALE_SECONDS = 60.0  # a file system over a network shows a new time late


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. Process numbers come again, so its start (Unix time, s) belongs to it."""

    host: str
    pid: int
    started: float
    token: str

    @classmethod
    def me(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def lives(self, silent_seconds: float) -> bool:
        """A process of this machine counts while it exists, one of another while its lock is renewed."""
        if self.host != socket.gethostname():
            return silent_seconds < _STALE_SECONDS
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 2.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class RunLock:
    """Life cycle: entered before anything of the run is written, left when the run has ended; `check` at times.

        with RunLock(config.run_dir) as lock:
            ...
            lock.check()

    A lock whose owner has died is taken over.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / FILE
        self._me = Owner.me()
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Raises:
        ConfigError: another process works on the run; says which.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        while not self._made():
            if owner := living_owner(self._file.parent):
                raise in_progress(self._file.parent, owner)
            self._remove_dead()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        if _read(self._file) == self._me:
            self._file.unlink()

    def check(self) -> None:
        """Raises:
        RunError: another process has taken the run over, since this one was silent for long.
        """
        if self._lost:
            raise RunError(
                f"another process ({_read(self._file)}) has taken over the run in {str(self._file.parent)!r}, since "
                f"this one was silent for more than {_STALE_SECONDS:.0f} s"
            )

    def _made(self) -> bool:
        try:
            with self._file.open("x") as file:
                file.write(json.dumps(asdict(self._me)))
        except FileExistsError:
            return False
        return True

    def _remove_dead(self) -> None:
        """Remove a lock whose owner has died; one process at a time, or the second would remove the lock that the
        first has made in its place."""
        guard = self._file.with_name(f".{FILE}.partial")
        try:
            guard.open("x").close()
        except FileExistsError:
            if (_silent_seconds(guard) or 0.0) > _STALE_SECONDS:  # left by one that died in here
                guard.unlink(missing_ok=True)
            time.sleep(_GUARD_SECONDS)
            return
        try:
            if living_owner(self._file.parent) is None:
                self._file.unlink(missing_ok=True)
        finally:
            guard.unlink()

    def _keep_renewing(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS):
            if _read(self._file) != self._me:
                self._lost = True
                return
            with suppress(OSError):  # a disk that has become read-only: it is tried again
                os.utime(self._file)


def living_owner(run_dir: Path) -> str | None:
    """The process that works on the run in a folder, in words; None where there is none."""
    file = run_dir / FILE
    silent = _silent_seconds(file)
    if silent is None:
        return None
    owner = _read(file)
    if owner is None:  # made and not written yet, or no lock at all
        return "a process that has just begun" if silent < _RENEW_SECONDS else None
    return f"{owner}, last heard of {silent:.0f} s ago" if owner.lives(silent) else None


def in_progress(run_dir: Path, owner: str) -> ConfigError:
    return ConfigError(
        f"name: {str(run_dir)!r} is the folder of a run in progress ({owner}); wait for its end, stop it, or choose "
        "another --name"
    )


def _read(file: Path) -> Owner | None:
    try:
        return Owner(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none, or not a lock
        return None


def _silent_seconds(file: Path) -> float | None:
    """Since the lock was made or renewed, by the clock of its file system: those of two hosts may differ. None where
    there is no lock."""
    try:
        renewed = file.stat().st_mtime
        with TemporaryFile(dir=file.parent) as probe:
            return max(os.fstat(probe.fileno()).st_mtime - renewed, 0.0)
    except FileNotFoundError:
        return None
