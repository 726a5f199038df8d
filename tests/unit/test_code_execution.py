"""Programs that a model wrote are run in a process of their own, and kept in."""

import os
import time

import pytest

from common.datasets.rows import open_rows
from deploy.evaluation.code_execution import (
    Outcome,
    can_become_nobody,
    code_of,
    program_of,
    run_program,
    run_programs,
    sandbox_notes,
)

HUMANEVAL = {
    "prompt": "from math import floor\n\ndef helper(x):\n    return floor(x)\n\ndef rounded(x):\n    '''Whole.'''\n",
    "entry_point": "rounded",
    "test": "def check(candidate):\n    assert candidate(2.5) == 2\n    assert candidate(-0.5) == -1\n",
}
MBPP = {
    "prompt": "Write a function that doubles.",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == 4", "assert double(math.inf) == math.inf"],
}


def run(program: str, **options) -> Outcome:
    return run_program(program, become_nobody=can_become_nobody(), **options)


@pytest.mark.parametrize(
    ("record", "code", "passed"),
    [
        (HUMANEVAL, "    return helper(x)\n", True),  # goes on with the prompt
        (HUMANEVAL, "    return int(x)\n", False),
        (HUMANEVAL, "def rounded(x):\n    return helper(x)\n", True),  # with the prompt's imports and helpers
        (HUMANEVAL, "import math\n\ndef rounded(x):\n    return math.floor(x)\n", True),
        (HUMANEVAL, "def other(x):\n    return 1\n", False),
        (HUMANEVAL, "", False),
        (HUMANEVAL, "def rounded(x):\n    retur", False),
        (MBPP, "def double(x):\n    return 2 * x", True),
        (MBPP, "def double(x):\n    return 4", False),
        ({**MBPP, "test_imports": None, "test_setup_code": "import math"}, "def double(x):\n    return 2 * x", True),
    ],
)
def test_a_program_passes_if_all_tests_of_its_problem_do(record, code, passed):
    assert run(program_of(record, code)).passed is passed


@pytest.mark.parametrize(
    ("text", "begun", "code"),
    [
        ("def f():\n    pass\n```\nThis passes.", True, "def f():\n    pass\n"),
        ("def f():\n    pass", True, "def f():\n    pass"),
        ("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", False, "x = 1"),
        ("```\nx = 1\n```", False, "x = 1"),
        ("```py\nx = 1", False, "x = 1"),  # cut at the limit
        ("    return 1\n", False, "    return 1\n"),
    ],
)
def test_the_code_of_a_response(text, begun, code):
    assert code_of(text, begun) == code


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("import os, time\nif os.fork(): time.sleep(60)", "timed out"),
        ("x = [0] * 10**9", "MemoryError"),
        ("import os; os._exit(0)", "ended early (0)"),  # before the tests: that is no success
        ("import sys; sys.exit(0)", "SystemExit"),
        ("def f(: pass", "SyntaxError"),
        ("assert False", "AssertionError"),
        ("open('large', 'w').write('x' * 10**8)", "OSError"),
        ('print(\'{"mark": "guess", "error": ""}\'); raise KeyError', "KeyError"),
    ],
)
def test_what_becomes_of_programs_that_fail(program, reason):
    start = time.monotonic()
    outcome = run(program, seconds=3, memory_bytes=2**29)
    assert not outcome.passed
    assert outcome.reason == reason
    assert time.monotonic() - start < 20


def test_a_program_has_an_empty_folder_of_its_own_and_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    assert run(
        "import os\nassert not os.listdir('.')\nopen('a', 'w').write('b')\nassert os.listdir('.') == ['a']"
    ).passed
    assert run("import os\nassert 'A_SECRET' not in os.environ and os.environ['HOME'] == os.getcwd()").passed
    assert run("import sys\nassert sys.stdin.read() == ''\nprint('x' * 10**6)").passed


@pytest.mark.skipif(any("keep their network" in note for note in sandbox_notes()), reason="no network namespaces here")
def test_a_program_has_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3)"
        socket.create_connection(("127.0.0.1", port), 3).close()
        assert run(connect).reason in ("OSError", "ConnectionRefusedError")
    assert run("x = 1").network_off


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_roots_programs_cannot_change_its_files(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    for wrong in (f"open({str(kept)!r}, 'w')", f"import os; os.remove({str(kept)!r})", "import os; os.setuid(0)"):
        assert run(wrong).reason == "PermissionError"
    assert kept.read_text() == "here"
    assert can_become_nobody()


def test_many_programs_in_their_order():
    done = []
    outcomes = run_programs([f"assert {i} % 3" for i in range(7)], lambda: done.append(1))
    assert [o.passed for o in outcomes] == [bool(i % 3) for i in range(7)]
    assert len(done) == 7


def test_solutions_that_come_with_humaneval_pass(tmp_path):
    """In the form of that file, so that the reference solution is a response."""
    file = tmp_path / "humaneval.jsonl"
    file.write_text(
        '{"task_id": "H/0", "prompt": "def one():\\n    \\"\\"\\"One.\\"\\"\\"\\n", "entry_point": "one", '
        '"canonical_solution": "    return 1\\n", "test": "def check(f):\\n    assert f() == 1\\n"}\n'
    )
    programs = [program_of(r, r["canonical_solution"]) for _, r in open_rows(str(file))]
    assert [o.passed for o in run_programs(programs)] == [True]
