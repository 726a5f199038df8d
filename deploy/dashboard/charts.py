"""The charts of the page, in their order on the page. Units and help texts come from the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.monitoring.metrics import METRICS
from deploy.roles import ROLES


@dataclass(frozen=True)
class Line:
    """One metric of a chart. `style`: line, smooth (with a moving average over it), step or points; `role` gives the
    role's colour."""

    metric: str
    label: str
    style: str = "line"
    role: str = ""


@dataclass(frozen=True)
class Chart:
    """`section` names the place on the page. A chart without any data (no evaluation, say) is not shown."""

    name: str
    section: str
    title: str
    lines: tuple[Line, ...]
    scale: str = "linear"
    format: str = "~s"

    @property
    def unit(self) -> str:
        return METRICS[self.lines[0].metric].unit


def _evaluated(metric: str, label: str) -> tuple[Line, ...]:
    """A metric of evaluations during training, if it is in the registry."""
    return (Line(metric, label, "points"),) if metric in METRICS else ()


CHARTS = (
    Chart(
        "throughput",
        "throughput",
        "Tokens per second of each stage",
        tuple(Line(f"{role}/tokens_per_second", role, "smooth", role) for role in ROLES),
        scale="log",
    ),
    Chart("kl", "learning", "KL to the teacher", (Line("kl", "KL", "smooth"),), format="~g"),
    Chart(
        "held_out_kl",
        "learning",
        "KL on held-out prompts",
        (
            *_evaluated("eval/held_out_kl", "all offsets"),
            *(line for o in range(1, 5) for line in _evaluated(f"eval/held_out_kl_{o}", f"offset {o}")),
        ),
        format="~g",
    ),
    Chart(
        "accepted",
        "learning",
        "Drafts kept on held-out prompts",
        _evaluated("eval/held_out_accepted", "accepted"),
        format=".0%",
    ),
    Chart(
        "accuracy",
        "learning",
        "Accuracy on held-out problems",
        _evaluated("eval/exact_match", "exact match"),
        format=".0%",
    ),
    Chart(
        "agreement",
        "learning",
        "Same best token as the teacher",
        (Line("teacher_agreement", "agreement", "smooth"),),
        format=".0%",
    ),
    Chart(
        "tokens_per_step",
        "decoding",
        "Tokens per step",
        (Line("tokens_per_step", "rollouts", "smooth"), *_evaluated("eval/tokens_per_step", "evaluation")),
        format="~g",
    ),
    Chart(
        "length",
        "decoding",
        "Response length and its limit",
        (Line("response_length", "mean length"), Line("response_limit", "limit", "step")),
    ),
    Chart("staleness", "flow", "Staleness", (Line("staleness", "staleness", "step"),), format="~g"),
    Chart(
        "queues",
        "flow",
        "Queue depths",
        tuple(Line(f"queue/{role}", role, "step", role) for role in ROLES),
    ),
    Chart(
        "publish_seconds",
        "flow",
        "Publishing: seconds",
        (Line("seconds/publish", "publish", "smooth"), Line("seconds/weights_pause", "pause of a sampler")),
        format="~g",
    ),
    Chart("publish_bytes", "flow", "Publishing: bytes", (Line("bytes/weights", "weights", "step"),)),
    Chart("seconds", "more", "Wall time of a batch", (Line("seconds/batch", "batch", "smooth"),), format="~g"),
    Chart(
        "grad_norm",
        "more",
        "Gradient norm",
        (Line("grad_norm", "before clipping", "smooth"),),
        scale="log",
        format="~g",
    ),
    Chart("lr", "more", "Learning rate", (Line("lr", "learning rate"),), format="~g"),
    Chart(
        "flops",
        "more",
        "FLOPs so far",
        tuple(Line(f"flops/{role}", role, role=role) for role in ROLES),
    ),
    Chart("gpu_hours", "more", "GPU hours so far", (Line("gpu_hours", "GPU hours"),), format="~g"),
    Chart("trajectory_bytes", "more", "Trajectories with targets", (Line("bytes/trajectories", "bytes"),)),
)


def described() -> list[dict[str, Any]]:
    """The charts as JSON, those of metrics that are in the registry."""
    return [
        {
            "name": chart.name,
            "section": chart.section,
            "title": chart.title,
            "scale": chart.scale,
            "format": chart.format,
            "unit": chart.unit,
            "help": "; ".join(dict.fromkeys(METRICS[line.metric].meaning for line in chart.lines)),
            "lines": [
                {"metric": line.metric, "label": line.label, "style": line.style, "role": line.role}
                for line in chart.lines
            ],
        }
        for chart in CHARTS
        if chart.lines
    ]
