"""Mathematical equality of two answers, by `math-verify` in a process of its own.

Computer algebra on what a model wrote may take hours or all memory (`9^{9^{9}}`), and math-verify's own deadline is a
signal, which works in a main thread only; rollout actors answer in others. So this file is also run as a program: it
reads one JSON pair a line and writes 1 or 0, with a limit on its memory. Past the deadline it is ended, and started
anew for the next pair.
"""

from __future__ import annotations

import json
import resource
import select
import subprocess
import sys
import threading
from functools import lru_cache

_DEADLINE_S = 10.0
_START_S = 120.0  # to import sympy on a busy machine
_OWN_DEADLINE_S = 3  # of math-verify for each step
_MEMORY = 4 * 2**30
_LONGEST = 400  # characters of an answer

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


@lru_cache(maxsize=65536)
def mathematically_equal(reference: str, given: str) -> bool:
    """Whether two expressions in LaTeX are equal; False too where that is not found out in time."""
    if max(len(reference), len(given)) > _LONGEST:
        return False
    with _lock:
        process = _running()
        assert process.stdin
        process.stdin.write(json.dumps([reference, given]) + "\n")
        process.stdin.flush()
        return _answer(process, _DEADLINE_S) == "1"


def _running() -> subprocess.Popen[str]:
    global _process
    if _process is None or _process.poll() is not None:
        _process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if _answer(_process, _START_S) != "ready":
            raise RuntimeError(f"math-verify does not start: run {sys.executable} {__file__} to see why")
    return _process


def _answer(process: subprocess.Popen[str], deadline_s: float) -> str:
    """The next line; the process is ended, and the answer empty, where it is too slow or needs too much memory."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], deadline_s)
    line = process.stdout.readline() if ready else ""
    if not line:
        process.kill()
        process.wait()
    return line.strip()


def _serve() -> None:
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("ready", flush=True)
    latex = [LatexExtractionConfig()]
    for line in sys.stdin:
        reference, given = (
            parse(f"${text.strip().strip('$')}$", latex, parsing_timeout=_OWN_DEADLINE_S) for text in json.loads(line)
        )
        equal = bool(reference and given) and verify(reference, given, timeout_seconds=_OWN_DEADLINE_S)
        print(int(equal), flush=True)


if __name__ == "__main__":
    _serve()
