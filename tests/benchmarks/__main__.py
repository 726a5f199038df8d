"""Benchmarks in one command: `python -m tests.benchmarks --device cpu|cuda --size tiny|mid|135m|0.6b|4b [--out FILE]`.

Fields of the loop's runs come last, behind `--`: `--parts loop --size 135m -- --learner.compile false`.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deploy.files import replace_text
from tests.benchmarks import (
    learner_rank,
    learner_step,
    loop,
    operators,
    pipeline,
    predecessor,
    publish,
    sampler,
    scaling,
    serve,
    teacher,
    verified,
)

# a part's function takes (size, device, *plan) and yields rows as they are measured
PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "sampler": sampler.measure,  # sequences, prompt, new tokens
    "learner": learner_step.measure,  # rows, prompt, response, packing budget
    "rank": learner_rank.measure,  # as the learner
    "teacher": teacher.measure,  # requests, prompt, response, tokens of one forward
    "publish": publish.measure,
    "pipeline": pipeline.measure,  # rollout batches
    "loop": loop.measure,  # rollout batches after the warm-up
    "scaling": scaling.measure,
    "serve": serve.measure,  # requests for each client, prompt, new tokens
    "verified": verified.measure,  # responses at most, prompt, new tokens
    "predecessor": predecessor.measure,  # prompts, prompt, new tokens
}
PROFILES: dict[str, Callable[..., list[operators.Operator]]] = {
    "sampler": sampler.profile,
    "learner": learner_step.profile,
    "rank": learner_rank.profile,
    "teacher": teacher.profile,
}
PLANS: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {
        "sampler": (32, 80, 40),
        "learner": (8, 80, 40, 4096),
        "rank": (8, 80, 40, 4096),
        "teacher": (32, 80, 40, 2048),
        "publish": (),
        "pipeline": (20,),
        "loop": (20,),
        "scaling": (),
        "serve": (4, 80, 40),
        "verified": (32, 40, 40),
        "predecessor": (32, 32, 32),
    },
    "mid": {
        "sampler": (16, 64, 16),
        "learner": (4, 64, 32, 1024),
        "rank": (4, 64, 32, 1024),
        "teacher": (16, 64, 32, 1024),
        "publish": (),
    },
    "135m": {
        "sampler": (128, 128, 512),
        "learner": (16, 64, 220, 32768),
        "rank": (16, 64, 220, 32768),
        "teacher": (32, 128, 1024, 32768),
        "publish": (),
        "loop": (20,),
        "serve": (4, 128, 256),
        "verified": (256, 128, 256),
    },
    "0.6b": {
        "sampler": (128, 128, 512),
        "learner": (2, 128, 2048, 8704),
        "rank": (2, 128, 2048, 8704),
        "teacher": (32, 128, 1024, 8192),
        "publish": (),
        "pipeline": (16,),
        "loop": (20,),
        "serve": (4, 512, 256),
        "verified": (256, 128, 256),
        "predecessor": (128, 128, 512),
    },
    "4b": {
        "sampler": (128, 128, 512),
        "learner": (2, 128, 2048, 8704),
        "rank": (2, 128, 2048, 8704),
        "teacher": (32, 128, 1024, 8192),
        "publish": (),
        "loop": (20,),
    },
}
BY_NAME = ("scaling", "loop", "serve", "verified", "predecessor")
WHOLE = [part for part in PARTS if part not in BY_NAME]


class Results:
    """What was measured; the file, if any, is replaced with every row. A row that is given again, now complete, is
    written again. The loop's are also written to `rows`, behind those that this file held.

    A part that cannot run here is named under `skipped`, with the reason; its rows so far stay.
    """

    def __init__(self, facts: dict[str, str], out: Path | None, rows: Path | None = None) -> None:
        self.content: dict[str, Any] = dict(facts)
        self.failed = False
        self._out = out
        self._rows = rows
        self._loop: list[dict[str, Any]] = []
        self._before = json.loads(rows.read_text()) if rows and rows.exists() else []

    def add(self, part: str, size: str, row: dict[str, Any]) -> None:
        print(part, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        _put(self.content.setdefault(f"{part} {size}", []), row)
        if part == "loop":
            _put(self._loop, row)
        self._write()

    @contextmanager
    def going_on(self, part: str, size: str) -> Iterator[None]:
        """Around a part: whatever fails in it, the others are measured."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError):
                self.failed = True
                traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            print(f"{part} {size} skipped: {reason}", flush=True)
            self.content.setdefault("skipped", {})[f"{part} {size}"] = reason
            self._write()

    def _write(self) -> None:
        if self._out:
            replace_text(self._out, json.dumps(self.content, indent=2) + "\n")
        if self._rows and self._loop:
            rows = [row | {"torch": self.content["torch"]} for row in self._loop]
            replace_text(self._rows, json.dumps(self._before + rows, indent=1) + "\n")


def _put(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Behind the others, where it is not the last of them already."""
    if not rows or rows[-1] is not row:
        rows.append(row)


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for; the exit status is 1 if a part failed for another reason than a missing package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(PLANS), nargs="+", default=["tiny"])
    parser.add_argument("--parts", choices=list(PARTS), nargs="+", default=WHOLE)
    parser.add_argument("--sequences", type=int, help="of the sampler; default: by size")
    parser.add_argument("--batches", type=int, help="rollout batches of pipeline or loop; default: by size")
    parser.add_argument("--profile", action="store_true", help="show also where the time goes")
    parser.add_argument("--out", type=Path, help="JSON file, replaced with every row")
    parser.add_argument("--rows", type=Path, help="JSON list to which the rows of the loop are added")
    parser.add_argument("--gpus", type=int, default=1, help="of the loop; default: 1")
    parser.add_argument(
        "--splits", nargs="+", default=[], help="GPUs of learner:rollout:teacher in the loop, such as 2:1:1 or 1:0:0"
    )
    parser.add_argument("--tokenizer", help="folder or .tiktoken file of the loop's or predecessor's; default: by size")
    parser.add_argument(
        "--seconds", type=float, help="for both runs of each of the loop's splits, or all of serve; default: no limit"
    )
    parser.add_argument("--mps", action="store_true", help="the loop's roles share a GPU by NVIDIA's MPS")
    parser.add_argument(
        "--model", help="folder of the loop's model, or of verified's or serve's student; default: random weights"
    )
    parser.add_argument(
        "--prompts", help="file of the loop's, verified's or serve's prompts; default: the repository's word problems"
    )
    parser.add_argument("--original", help="folder of the model that serve asks other engines for, beside --model")
    parser.add_argument("--clients", type=int, nargs="+", default=[], help="of serve; default: 1 8 32 128")
    parser.add_argument("--reference", help="folder with a checkout of divelab/OPDLM, for the part predecessor")
    parser.add_argument("fields", nargs="*", help="of the loop's runs, behind --")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results = Results({"device": device, "torch": torch.__version__}, options.out, options.rows)
    wanted = loop.Wanted(
        options.gpus, tuple(options.splits), options.tokenizer, options.model, options.prompts, tuple(options.fields),
        options.seconds, options.mps, tuple(options.clients), options.original,
    )  # fmt: skip
    for size in options.size:
        for part, plan in PLANS[size].items():
            if part not in options.parts:
                continue
            first = {"sampler": options.sequences, "pipeline": options.batches, "loop": options.batches}.get(part)
            plan = (first, *plan[1:]) if first else plan
            with results.going_on(part, size):
                measured: dict[str, Any] = {"wanted": wanted} if part in ("loop", "serve", "verified") else {}
                if part == "predecessor":
                    measured = {"reference": options.reference, "tokenizer": options.tokenizer}
                for row in PARTS[part](size, options.device, *plan, **measured):
                    results.add(part, size, row)
                if options.profile and part in PROFILES:
                    print(operators.table(PROFILES[part](size, options.device, *plan)), flush=True)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
