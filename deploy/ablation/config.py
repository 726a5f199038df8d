"""An ablation: arms that differ in a few fields, trained on the same prompts for the same number of updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from common.config.paths import InputPath, OutputFolder
from common.config.run import RunName
from common.config.section import Section
from common.config.values import MOST_TOKENS, Temperature


class RespondConfig(Section):
    """The offline responses that off-policy arms train on: what `opdlm respond` is told."""

    temperature: Temperature = Field(1.0, description="of the teacher's sampling softmax; 0: greedy")
    top_p: float = Field(1.0, ge=1e-6, le=1, description="sample from the smallest set of this mass")
    samples: int = Field(1, ge=1, le=10**4, description="responses per prompt")
    keep: Literal["all", "best"] = Field("all", description="all of them, or one: a right one, near to the student")


class EvaluateConfig(Section):
    """What every arm's final model is evaluated on, under static and dynamic decoding: what `opdlm eval` is told."""

    suites: tuple[str, ...] = Field((), description="NAME or NAME=SOURCE, such as ifeval")
    suite_data: InputPath | None = Field(None, description="folder that holds the suites' files; none: from the hub")
    problems: InputPath | None = Field(None, description="file of questions and answers; a suite named as the file")
    count: int | None = Field(None, ge=1, description="evaluate the first N problems of each suite; none: all")
    run_code: bool = Field(False, description="run the programs that the model writes, for humaneval and mbpp")
    threshold: float = Field(0.9, ge=0, le=1, description="confidence threshold of dynamic decoding")
    max_new_tokens: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="response length limit, tokens; none: each suite's own"
    )
    slots: int = Field(64, ge=1, description="sequences decoded at the same time")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights and activations")
    original: bool = Field(True, description="evaluate the original once too, beside the first run")

    @property
    def names(self) -> list[str]:
        """Of the suites, in the order of the report's columns."""
        return [
            *(suite.partition("=")[0] for suite in self.suites),
            *([Path(self.problems).stem] if self.problems else []),
        ]

    @model_validator(mode="after")
    def _has_something(self) -> EvaluateConfig:
        if not self.names:
            raise ValueError("neither suites nor problems are given; give one, or leave the section out")
        return self


class Claim(Section):
    """One of the paper's claims as a difference of two arms that can be measured."""

    text: str = Field(description="the claim, in words")
    better: str = Field(description="name of the arm that should score higher")
    worse: str = Field(description="name of the arm that should score lower")
    metric: str = Field(
        description="static, dynamic (exact match), loss (static minus dynamic), held_out_kl, of these two lower is "
        "better, held_out_accepted (share of drafts that verified decoding keeps), or of a suite its score or tokens "
        "per step: ifeval static, ifeval dynamic, ifeval tokens_per_step (dynamic)",
        pattern="^(static|dynamic|loss|held_out_kl|held_out_accepted|.+ (static|dynamic|tokens_per_step))$",
    )

    @property
    def suite(self) -> str:
        """That the metric is of; "": of none."""
        return self.metric.rpartition(" ")[0]


class LineStyle(Section):
    """How the plot of the curves draws an arm."""

    color: str | None = Field(None, description="as matplotlib names it, such as C3 or '#e07000'; default: by order")
    line: Literal["solid", "dashed", "dotted", "dashdot"] = Field("solid", description="of the curve")

    @field_validator("color")
    @classmethod
    def _is_known(cls, color: str | None) -> str | None:
        from matplotlib.colors import is_color_like  # a tenth of a second that few ablations need

        if color is not None and not is_color_like(color):
            raise ValueError(f"{color!r} is no color of matplotlib; write one such as C3, teal or '#e07000'")
        return color


_BESIDE_FIELDS = ("style", "seeds", "respond")


class ArmConfig(Section):
    """An arm's own fields, as `field: value` over base and overrides, and beside them how it is drawn, and its seeds
    and offline responses where they are not those of all."""

    fields: dict[str, Any] = Field({}, description="field: value; may stand in the arm itself, beside the others")
    style: LineStyle = LineStyle()
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="of the ablation's seeds; default: all")
    respond: RespondConfig | None = Field(None, description="offline responses of its own; default: those of all arms")

    @model_validator(mode="before")
    @classmethod
    def _beside_the_style(cls, arm: Any) -> Any:
        if not isinstance(arm, Mapping) or "fields" in arm:
            return arm
        own = {"fields": {name: value for name, value in arm.items() if name not in _BESIDE_FIELDS}}
        return own | {name: arm[name] for name in _BESIDE_FIELDS if name in arm}


class AblationConfig(Section):
    """Every arm is trained once per seed, seed by seed, so that an interrupted ablation has all arms so far."""

    name: RunName = Field(description="the runs are in output_dir/name/ARM-seedN")
    base: str = Field(description="preset or YAML file of a run, the same for all arms")
    output_dir: OutputFolder = Field(Path("runs"), description="folder of all runs")
    report: OutputFolder = Field(
        Path("docs/evidence.md"), description="the report; its plots go into images/ beside it"
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="seeds of prompts' order and sampling")
    overrides: dict[str, Any] = Field({}, description="field: value, over the base, for all arms")
    respond: RespondConfig = RespondConfig()
    evaluate: EvaluateConfig | None = Field(None, description="suites for every arm's final model; none: no suites")
    arms: dict[str, ArmConfig] = Field(min_length=1, description="name of the arm: its own field: value, and its style")
    claims: tuple[Claim, ...] = Field((), description="claims that the report gives a verdict on")
    reading: str = Field("", description="what the authors conclude from it, Markdown; a section of the report")

    @model_validator(mode="after")
    def _arms_have_known_seeds(self) -> AblationConfig:
        for name, arm in self.arms.items():
            if unknown := sorted(set(arm.seeds or ()) - set(self.seeds)):
                raise ValueError(
                    f"arm {name!r} has seed {unknown[0]}, which is none of seeds {list(self.seeds)}; add it there"
                )
        return self

    @model_validator(mode="after")
    def _claims_name_arms(self) -> AblationConfig:
        for claim in self.claims:
            for arm in (claim.better, claim.worse):
                if arm not in self.arms:
                    raise ValueError(f"claim {claim.text!r} names arm {arm!r}; arms are {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _claims_name_suites(self) -> AblationConfig:
        names = self.evaluate.names if self.evaluate else []
        for claim in self.claims:
            if claim.suite and claim.suite not in names:
                known = ", ".join(names) or "none"
                raise ValueError(f"claim {claim.text!r} names suite {claim.suite!r}; suites of evaluate are {known}")
        return self
