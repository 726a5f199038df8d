"""The generated parts of docs/scaling.md: `python -m tests.benchmarks.scaling_page` writes them anew.

They stand between `<!-- begin NAME -->` and `<!-- end NAME -->`, made from docs/benchmarks/scaling.json (sweeps on CPU)
and docs/benchmarks/h200.json (the rates of one GPU).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common.config.file import load_config
from common.config.run import RunConfig
from deploy.placement import plan
from tests.benchmarks.recipe_model import Assumed, Estimate, Rates, Split, best_split, estimate, read_rates

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PLOT = DOCS / "scaling.md", DOCS / "images" / "scaling.png"
SWEEPS, GPU = DOCS / "benchmarks" / "scaling.json", DOCS / "benchmarks" / "h200.json"

RECIPE = "qwen3-8b"
GPUS = (8, 64, 512)
SCALES = (4, 16, 64)
PROMPTS = 61_816
_STAGES = ("rollout", "teacher", "learner", "publish")


def write() -> None:
    PAGE.write_text(page(PAGE.read_text()))


def page(text: str) -> str:
    """The page with its generated parts replaced.

    Raises:
        KeyError: a marker names no part.
    """
    made = parts()
    pattern = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", re.DOTALL)
    return pattern.sub(lambda m: f"<!-- begin {m[1]} -->\n{made[m[1]]}\n<!-- end {m[1]} -->", text)


def parts() -> dict[str, str]:
    """Markdown by the marker's name."""
    config, rates, assumed = load_config(RECIPE), read_rates(GPU), Assumed()
    unchanged = [best_split(config, gpus, rates, assumed) for gpus in GPUS]
    preset = Split(config.rollout.actors, config.teacher.actors, config.learner.ranks)
    scaled = [(gpus, scale, best_split(config, gpus, rates, assumed, scale)) for gpus in GPUS[1:] for scale in SCALES]
    return {
        "sweeps": _sweeps(json.loads(SWEEPS.read_text())),
        "constants": _constants(rates, assumed),
        "recipe": _recipe(
            config,
            [("the preset, 8", estimate(config, preset, rates, assumed))]
            + [(f"at most {gpus}", e) for gpus, e in zip(GPUS, unchanged, strict=True)]
        ),
        "bytes": _bytes([(f"{gpus}, x 1", e) for gpus, e in zip(GPUS, unchanged, strict=True)]
                        + [(f"{gpus}, x {scale}", e) for gpus, scale, e in scaled]),
        "scaled": _scaled(config, scaled),
        "limits": _limits(config, unchanged, rates, assumed),
    }  # fmt: skip


def _sweeps(rows: list[dict[str, Any]]) -> str:
    """A line per sweep and part: the cost of every point over that of the first."""
    lines = [["sweep", "of", "from", "first cost", "cost at the later points, first = 1"]]
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault((row["sweep"], row["part"]), []).append(row)
    for (sweep, part), points in series.items():
        first = points[0]
        unit = "s a batch" if "batch" in part else "ms a token"
        later = ", ".join(f"{p['x']:,}: {p['cost'] / first['cost']:.2f}" for p in points[1:])
        of = "the whole loop" if "batch" in part else part
        lines.append([sweep, of, f"{first['x']:,}", f"{first['cost']:.3g} {unit}", later])
    return table(lines, right=())


def _constants(rates: Rates, assumed: Assumed) -> str:
    teacher = "measured" if rates.teacher_measured else "not measured; taken as the learner's"
    publish = "measured" if rates.publish else "not measured; the target for 4B in a second"
    return table(
        [
            ["constant", "value", "source"],
            [
                "memory, read and written",
                f"{rates.copy / 1e12:.2f} TB/s",
                f"{rates.device}, behind the sampler's floor",
            ],
            ["large bfloat16 product", f"{rates.products / 1e12:.0f} TFLOP/s", "measured"],
            ["sampler, of the floor", f"{rates.of_floor:.0%}", f"measured at {rates.sampler_of}"],
            ["learner, of the product's rate", f"{rates.learner:.0%}", f"measured: {rates.learner_of}"],
            ["teacher, of the product's rate", f"{rates.teacher:.0%}", teacher],
            ["publishing on a node", f"{(rates.publish or assumed.publish) / 1e9:.1f} GB/s", publish],
            ["object store to object store", f"{assumed.objects / 1e9:.0f} GB/s a node", "assumed"],
            ["GPU to GPU in a node", f"{assumed.link / 1e9:.0f} GB/s", "data sheet"],
            ["GPU to GPU between nodes", f"{assumed.network / 1e9:.0f} GB/s", "data sheet, one 400 Gbit/s port a GPU"],
            ["mean response", f"{assumed.response:,.0f} tokens", "published: 0.066B tokens, 61,816 prompts"],
            ["mean prompt", f"{assumed.prompt} tokens", "assumed"],
            ["tokens per step", str(assumed.tokens_per_step), "published: 1.9 for 4B at the same threshold"],
            ["masked share of response positions", f"{assumed.trained:.0%}", "one realised round per block"],
        ],
        right=(1,),
    )


def _recipe(config: RunConfig, estimates: list[tuple[str, Estimate]]) -> str:
    lines = [["GPUs", "used: rollout + teacher + learner", *(f"{s}, s" for s in _STAGES), "batch at staleness 0, s"]]
    lines[0] += ["at staleness 1, s", *(f"{s}, tokens/s" for s in _STAGES[:3]), "whole run, h"]
    for name, e in estimates:
        s = e.split
        in_turn, overlapped = e.batch_seconds
        used = f"{s.used}: {s.rollout} + {s.teacher} + {s.learner}"
        hours = PROMPTS / config.rollout.prompts_per_batch * overlapped / 3600
        rates = [f"{e.tokens_per_second[stage]:,.0f}" for stage in _STAGES[:3]]
        stages = [f"{e.seconds[stage]:.1f}" for stage in _STAGES]
        lines.append([name, used, *stages, f"{in_turn:.1f}", f"{overlapped:.1f}", *rates, f"{hours:.1f}"])
    return table(lines, right=range(2, len(lines[0])))


def _scaled(config: RunConfig, estimates: list[tuple[int, int, Estimate]]) -> str:
    lines = [["GPUs", "prompts a batch", "rows an update", "used: rollout + teacher + learner", "rollout, s"]]
    lines[0] += ["learner, s", "batch at staleness 1, s", "response tokens/s", "a GPU used", "epoch, h"]
    lines[0] += ["updates an epoch"]
    for gpus, scale, e in estimates:
        s, overlapped = e.split, e.batch_seconds[1]
        prompts, rows = scale * config.rollout.prompts_per_batch, scale * config.learner.batch_rows
        rate = prompts * Assumed().response / overlapped
        used = f"{s.used}: {s.rollout} + {s.teacher} + {s.learner}"
        hours = PROMPTS / prompts * overlapped / 3600
        line = [f"{gpus}", f"{prompts:,}", f"{rows:,}", used, f"{e.seconds['rollout']:.1f}"]
        line += [f"{e.seconds['learner']:.1f}", f"{overlapped:.1f}", f"{rate:,.0f}"]
        lines.append([*line, f"{rate / s.used:,.0f}", f"{hours:.2f}", f"{PROMPTS / rows:,.0f}"])
    return table(lines, right=(0, 1, 2, *range(4, len(lines[0]))))


def _bytes(estimates: list[tuple[str, Estimate]]) -> str:
    lines = [["GPUs, batch", "weights, GB", "trajectories, GB", "ZeRO-3, GB", "object store, GB"]]
    for name, e in estimates:
        columns = [e.network["weights"], e.network["trajectories"], e.network["ZeRO-3"], e.object_store]
        lines.append([name, *(f"{value / 1e9:,.2f}" for value in columns)])
    return table(lines, right=(1, 2, 3, 4))


def _limits(config: RunConfig, unchanged: list[Estimate], rates: Rates, assumed: Assumed) -> str:
    """The metrics that the text about limits refers to."""
    most = unchanged[-1]
    alone = estimate(config, Split(config.rollout.prompts_per_batch, 1, config.learner.batch_rows), rates, assumed)
    weights = 2 * plan(config).shape.parameters
    share = assumed.response / config.curriculum.max_tokens
    rows = [
        ["what", "value"],
        ["GPUs after which this batch gets no shorter", f"{most.split.used}"],
        ["rollouts with a GPU for every prompt", f"{alone.seconds['rollout']:.1f} s"],
        ["slots in use, mean over a rollout batch without refills", f"{share:.0%}"],
        ["learner with a rank for every row of an update", f"{alone.seconds['learner']:.1f} s"],
        ["one version of the weights", f"{weights / 1e9:.1f} GB"],
    ]
    return table(rows, right=(1,))


def table(rows: list[list[str]], right: Any) -> str:
    ruler = ["---:" if i in right else "---" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ruler, *rows[1:]])


if __name__ == "__main__":
    write()
