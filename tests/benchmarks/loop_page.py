"""The tables of the whole loop: `python -m tests.benchmarks.loop_page [FILE ...]` writes them into docs/performance.md.

The rows of the files, as `--parts loop --rows FILE` left them, are first added to docs/benchmarks/loop.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.files import replace_text
from learner.phase_clock import PHASES
from tests.benchmarks.scaling_page import DOCS, table

PAGE, ROWS = DOCS / "performance.md", DOCS / "benchmarks" / "loop.json"
_PART = re.compile(r"<!-- begin loop -->\n.*?<!-- end loop -->", re.DOTALL)


def main(files: list[str]) -> None:
    for file in files:
        add_rows(ROWS, json.loads(Path(file).read_text()))
    PAGE.write_text(page(PAGE.read_text(), json.loads(ROWS.read_text())))


def add_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Behind those that the JSON list in `file` holds."""
    held = json.loads(file.read_text()) if file.exists() else []
    replace_text(file, json.dumps(held + rows, indent=1) + "\n")


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the tables of these rows between its markers."""
    made = f"<!-- begin loop -->\n{_overview(rows)}\n{_phases(rows)}<!-- end loop -->"
    return _PART.sub(lambda _: made, text)


def _overview(rows: list[dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda r: r["size"],
        "GPUs (learner : rollout : teacher)": lambda r: f"{r['gpus']} {r['card']}" + _in_brackets(r.get("split")),
        "with": lambda r: r.get("what") or r.get("fields", ""),
        "response length": lambda r: _number(r["response_length"]),
        "response tokens/s": lambda r: _number(r["tokens_per_second"]),
        "GPU busy": lambda r: " ".join(_share(share) for share in r.get("gpu_busy") or [None]),
        "rollout / teacher / learner busy": lambda r: " / ".join(
            _share(r.get(f"busy_{role}")) for role in ("rollout", "teacher", "learner")
        ),
        "overhead": lambda r: f"{r['overhead']:.1%}",
        "slots in use": lambda r: _share(r.get("slots_in_use")),
        "batch, s": lambda r: f"{r['seconds_per_batch']:.2f}",
        "update, s": lambda r: f"{r['update_s']:.3f}" if r.get("update_s") else "",
        "learner MFU": lambda r: _share(r.get("learner_mfu")),
        "loading cold / cached, s": lambda r: _cold_and_cached(r, "loading"),
        "first batch cold / cached, s": lambda r: _cold_and_cached(r, "first_batch"),
    }
    lines = [list(columns), *([column(row) for column in columns.values()] for row in rows)]
    return table(lines, right=range(3, len(columns)))


def _phases(rows: list[dict[str, Any]]) -> str:
    """Where the learner's seconds of a batch go, of the rows that tell; nothing if none does."""
    lines = [["model", "GPUs", "with", "learner, s a batch", *PHASES]]
    for row in rows:
        if seconds := row.get("learner_seconds"):
            line = [row["size"], f"{row['gpus']} {row['card']}", row.get("what") or row.get("fields", "")]
            whole = sum(seconds.values())
            lines.append([*line, f"{whole:.2f}", *(f"{seconds[phase] / whole:.0%}" for phase in PHASES)])
    return f"\n{table(lines, right=range(3, len(lines[0])))}\n" if len(lines) > 1 else ""


def _cold_and_cached(row: dict[str, Any], what: str) -> str:
    return " / ".join(_number(row.get(f"{what}_{run}_s")) for run in ("cold", "cached"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _in_brackets(text: str | None) -> str:
    return f" ({text})" if text else ""


if __name__ == "__main__":
    main(sys.argv[1:])
