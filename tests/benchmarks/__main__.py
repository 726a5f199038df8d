"""Benchmarks in one command: `python -m tests.benchmarks --device cpu|cuda --size tiny|mid|0.6b|4b [--out FILE]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import learner_rank, learner_step, operators, pipeline, publish, sampler, scaling, teacher

# a part's function takes (size, device, *plan) and returns rows, or what else is to be kept
PARTS: dict[str, Callable[..., Any]] = {
    "sampler": sampler.measure,  # sequences, prompt, new tokens
    "learner": learner_step.measure,  # rows, prompt, response, packing budget
    "rank": learner_rank.measure,  # as the learner
    "teacher": teacher.measure,  # requests, prompt, response, tokens of one forward
    "publish": publish.measure,
    "pipeline": pipeline.measure,  # rollout batches
    "scaling": scaling.measure,
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
        "scaling": (),
    },
    "mid": {
        "sampler": (16, 64, 16),
        "learner": (4, 64, 32, 1024),
        "rank": (4, 64, 32, 1024),
        "teacher": (16, 64, 32, 1024),
        "publish": (),
    },
    "0.6b": {
        "sampler": (128, 128, 512),
        "learner": (2, 128, 2048, 8704),
        "rank": (2, 128, 2048, 8704),
        "teacher": (32, 128, 1024, 8192),
        "publish": (),
        "pipeline": (16,),
    },
    "4b": {
        "sampler": (128, 128, 512),
        "learner": (2, 128, 2048, 8704),
        "rank": (2, 128, 2048, 8704),
        "teacher": (32, 128, 1024, 8192),
        "publish": (),
    },
}
WHOLE = [part for part in PARTS if part != "scaling"]  # that one makes a page of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(PLANS), nargs="+", default=["tiny"])
    parser.add_argument("--parts", choices=list(PARTS), nargs="+", default=WHOLE)
    parser.add_argument("--sequences", type=int, help="of the sampler; default: by size")
    parser.add_argument("--batches", type=int, help="rollout batches of the pipeline; default: by size")
    parser.add_argument("--profile", action="store_true", help="show also where the time goes")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results: dict[str, object] = {"device": device, "torch": torch.__version__}
    for size in options.size:
        for part, plan in PLANS[size].items():
            if part not in options.parts:
                continue
            first = {"sampler": options.sequences, "pipeline": options.batches}.get(part)
            plan = (first, *plan[1:]) if first else plan
            rows = results[f"{part} {size}"] = PARTS[part](size, options.device, *plan)
            for row in rows:
                print(part, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
            if options.profile and part in PROFILES:
                print(operators.table(PROFILES[part](size, options.device, *plan)), flush=True)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
