"""Code suites: whether the program that a response makes passes the tests of its problem.

What a model wrote is run, so this is done only when it is asked for (`--run-code`). Each program is a process of its
own (code_sandbox.py) in an empty folder, with limits on time, memory and file size, without network where the kernel
lets a process leave it, and as `nobody` where root starts it. That keeps mistakes away from the machine; it is no wall
against an attacker. `sandbox_notes` says what could not be had here; where that is not enough, use a container.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy.evaluation import code_sandbox
from deploy.evaluation.suites import Record

SECONDS, MEMORY_BYTES = 10, 2**30
_FENCED = re.compile(r"```[a-zA-Z0-9_+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_PROBE = "import collections, heapq, itertools, math, re, typing"


@dataclass(frozen=True)
class Outcome:
    """`reason`: empty if the program ended well, else the name of its exception or what became of the process."""

    passed: bool
    reason: str = ""
    network_off: bool = True


def code_of(text: str, begun: bool) -> str:
    """The code of a response: its first fenced block. A response whose fence stands in the prompt already (`begun`)
    is code up to the closing fence; without any fence all of it is code."""
    fenced = None if begun else _FENCED.search(text)
    return fenced[1] if fenced else text.partition("```")[0]


def program_of(record: Record, code: str) -> str:
    """The program that tests a solution: raises where a test fails.

    HumanEval (`entry_point`): a solution without the function's head continues the prompt; else the prompt's imports
    and helpers stand before it. MBPP: the solution and its assertions.
    """
    if "entry_point" not in record:
        imports = record.get("test_imports") or [record.get("test_setup_code") or ""]
        return "\n".join([*imports, code, *record["test_list"]]) + "\n"
    prompt, name = record["prompt"], record["entry_point"]
    head = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    solution = head.split(prompt)[0] + code if head.search(code) else prompt + code
    return f"{solution}\n\n{record['test']}\n\ncheck({name})\n"


def run_programs(programs: list[str], done: Any = lambda: None) -> list[Outcome]:
    """The outcomes of all programs, as many at a time as there are processors; `done` is called after each."""

    def one(program: str) -> Outcome:
        outcome = run_program(program, become_nobody=can_become_nobody())
        done()
        return outcome

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(one, programs))


def run_program(
    program: str, *, become_nobody: bool = False, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> Outcome:
    """Run a program to its end, or for `seconds` of wall time; all its processes are ended then."""
    mark = secrets.token_hex(16)  # what the program prints, or an early exit, cannot be taken for the end
    order = {
        "program": program,
        "mark": mark,
        "become_nobody": become_nobody,
        "memory_bytes": memory_bytes,
        "seconds": seconds,
    }
    with TemporaryDirectory(prefix="opdlm-code-") as folder:
        if become_nobody:
            os.chown(folder, code_sandbox.NOBODY, code_sandbox.NOBODY)
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(code_sandbox.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            text=True,
        )
        try:
            said, _ = process.communicate(json.dumps(order), timeout=seconds)
            ended = process.returncode
        except subprocess.TimeoutExpired:
            said, ended = "", None
        with suppress(ProcessLookupError):  # what the program has started is ended too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        answer = json.loads(said)
    except ValueError:
        answer = {}
    if not isinstance(answer, dict) or answer.get("mark") != mark:
        return Outcome(False, "timed out" if ended is None else f"ended early ({ended})")
    return Outcome(not answer["error"], answer["error"], answer["network_off"])


@cache
def can_become_nobody() -> bool:
    """Whether programs can run as `nobody`: where root starts them, and the kernel lets it."""
    return os.geteuid() == 0 and run_program(_PROBE, become_nobody=True).passed


@cache
def sandbox_notes() -> tuple[str, ...]:
    """What a program is not kept from on this machine, in sentences."""
    probe = run_program(_PROBE, become_nobody=can_become_nobody())
    if not probe.passed:
        return (f"programs cannot be run here ({probe.reason}): all will count as failed",)
    notes = []
    if not probe.network_off:
        notes.append("programs keep their network: this kernel lets no process leave it")
    if not can_become_nobody():
        notes.append("programs run with your rights on files: use a container where that matters")
    return tuple(notes)
