"""One process works on a run: a second one is refused, a lock whose owner has died is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from common.config.errors import ConfigError
from common.config.file import REPOSITORY
from deploy import run_lock
from deploy.errors import RunError
from deploy.run_lock import FILE, Owner, RunLock, living_owner


def write_lock(folder: Path, owner: Owner, silent_seconds: float = 0.0) -> None:
    (folder / FILE).write_text(json.dumps(asdict(owner)))
    renewed = time.time() - silent_seconds
    os.utime(folder / FILE, (renewed, renewed))


def test_a_lock_holds_while_it_is_entered(tmp_path):
    folder = tmp_path / "runs" / "r"
    with RunLock(folder) as lock:
        lock.check()
        with pytest.raises(ConfigError, match=rf"run in progress \(process {os.getpid()} on "), RunLock(folder):
            pass
        assert living_owner(folder)
    assert not (folder / FILE).exists() and living_owner(folder) is None


@pytest.mark.parametrize(
    ("changed", "silent_seconds", "lives"),
    [
        ({}, 0.0, True),
        ({}, 3600.0, True),  # stopped or swapped out, and there all the same
        ({"started": 1.0}, 0.0, False),  # another process has that number now
        ({"pid": 2**30}, 0.0, False),
        ({"host": "another"}, 0.0, True),
        ({"host": "another"}, 3600.0, False),
    ],
)
def test_who_counts_as_living(tmp_path, changed, silent_seconds, lives):
    write_lock(tmp_path, replace(Owner.me(), **changed), silent_seconds)
    assert (living_owner(tmp_path) is not None) == lives
    if not lives:
        with RunLock(tmp_path):
            assert f"process {os.getpid()} on" in str(living_owner(tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_a_zombie_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(process.pid).create_time()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    write_lock(tmp_path, replace(Owner.me(), pid=process.pid, started=started))
    assert living_owner(tmp_path) is None
    process.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}'])
def test_a_file_that_is_no_lock_counts_for_a_moment_only(tmp_path, text):
    """It may be one that is just being written."""
    file = tmp_path / FILE
    file.write_text(text)
    assert living_owner(tmp_path) == "a process that has just begun"
    os.utime(file, (1.0, 1.0))
    with RunLock(tmp_path):
        pass


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path):
    write_lock(tmp_path, replace(Owner.me(), pid=2**30))
    code = (
        "import sys, time; from pathlib import Path; from common.config.errors import ConfigError\n"
        "from deploy.run_lock import RunLock\n"
        "print('ready', flush=True); sys.stdin.read()\n"
        "try:\n"
        f"    with RunLock(Path({str(tmp_path)!r})):\n"
        "        begin = time.monotonic(); time.sleep(0.3); print(begin, time.monotonic())\n"
        "except ConfigError: print('refused')\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, **pipes) for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.close()
    said = [process.stdout.read().split() for process in started]
    assert [process.wait() for process in started] == [0] * 4
    held = sorted(tuple(map(float, words)) for words in said if words != ["refused"])
    assert held and all(end <= begin for (_, end), (begin, _) in pairwise(held)), "one at a time"


def test_a_process_that_was_taken_over_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_RENEW_SECONDS", 0.01)
    with RunLock(tmp_path) as lock:
        write_lock(tmp_path, replace(Owner.me(), host="another"))
        lock._thread.join(timeout=10)
        with pytest.raises(RunError, match=r"another process \(process \d+ on another\) has taken over the run"):
            lock.check()
    assert (tmp_path / FILE).exists(), "the lock is the other's"


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_RENEW_SECONDS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / FILE, (1.0, 1.0))
        deadline = time.monotonic() + 10
        while (tmp_path / FILE).stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
