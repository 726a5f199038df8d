"""Benchmarks in one command: `python -m tests.benchmarks --device cpu|cuda --size tiny|mid|0.6b|4b [--out FILE]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tests.benchmarks import learner_step, publish, sampler

PLANS = {
    # sequences, prompt, new tokens; rows, prompt, response, packing budget
    "tiny": ((32, 80, 40), (8, 80, 40, 4096)),
    "mid": ((16, 64, 16), (4, 64, 32, 1024)),
    "0.6b": ((128, 128, 512), (2, 128, 2048, 8704)),
    "4b": ((128, 128, 512), (2, 128, 2048, 8704)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(PLANS), nargs="+", default=["tiny"])
    parts = ["sampler", "learner", "publish"]
    parser.add_argument("--parts", choices=parts, nargs="+", default=parts)
    parser.add_argument("--sequences", type=int, help="of the sampler; default: by size")
    parser.add_argument("--profile", action="store_true", help="show where the time of a sampler's pass goes (CUDA)")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results: dict[str, object] = {"device": device, "torch": torch.__version__}
    for size in options.size:
        for part, measure, plan in zip(
            parts, (sampler.measure, learner_step.measure, publish.measure), (*PLANS[size], ()), strict=True
        ):
            if part == "sampler" and options.sequences:
                plan = (options.sequences, *plan[1:])
            if part in options.parts:
                rows = measure(size, options.device, *plan)
                results[f"{part} {size}"] = rows
                for row in rows:
                    print(part, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
                if options.profile and part == "sampler":
                    for kernel, milliseconds, launches in sampler.profile(size, *plan):
                        print(f"{milliseconds:8.3f} ms a pass in {launches:6.1f} launches  {kernel}")
                if options.device == "cuda":
                    torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
