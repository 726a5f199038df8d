"""The run's configuration: one YAML file, validated here before any process starts.

Models forbid unknown keys, and every field that has a unit says it in its name or description. This module
imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from common.config.adapter import AdapterConfig
from common.config.cluster import RayConfig
from common.config.dashboard import DashboardConfig
from common.config.data import DataConfig
from common.config.evaluation import EvaluationConfig
from common.config.learner import LearnerConfig
from common.config.model import AttentionConfig, ModelConfig
from common.config.objective import ObjectiveConfig
from common.config.paths import OutputFolder
from common.config.pipeline import PipelineConfig
from common.config.publish import PublishConfig
from common.config.recovery import RecoveryConfig
from common.config.rollout import RolloutConfig
from common.config.schedule import AcceptanceGrowth, BlockGrowth, CurriculumConfig, NoGrowth
from common.config.section import OPERATION, Section
from common.config.shown import shown
from common.config.sources import NEED_RESPONSES, MixtureSource
from common.config.states import mixes_noise, trains_twice
from common.config.teacher import TeacherConfig, TeachersConfig
from common.config.unmasking import StaticUnmasking
from common.config.wandb import WandbConfig

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


def _is_folder_everywhere(name: str) -> str:
    if not _RUN_NAME.fullmatch(name) or name.endswith(".") or _DEVICES.fullmatch(name):
        raise ValueError(
            f"{shown(name)} is no name of a run; use up to 128 letters, digits, '.', '_' and '-', a letter or digit "
            "first and no '.' last, and no device of Windows such as con"
        )
    return name


RunName = Annotated[str, AfterValidator(_is_folder_everywhere)]


class RunConfig(Section):
    """Everything a run needs. See deploy/presets for complete examples."""

    name: RunName = Field(
        "run",
        description="folder under output_dir",
        json_schema_extra=OPERATION,
    )
    output_dir: OutputFolder = Field(
        Path("runs"),
        description="parent of the runs' folders; relative: to the current folder",
        json_schema_extra=OPERATION,
    )
    cache_dir: OutputFolder | None = Field(
        None,
        description="folder on every machine where compiled code is kept for later runs, which then start in seconds; "
        "default: opdlm/compiled in the user's cache ($XDG_CACHE_HOME or ~/.cache)",
        json_schema_extra=OPERATION,
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of prompt order, sampling and state selection")
    block_size: int = Field(4, ge=1, description="tokens per block on the absolute grid, at first")
    block_growth: BlockGrowth = Field(NoGrowth(), description="how it grows during training")
    attention: AttentionConfig = AttentionConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeachersConfig = TeachersConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    adapter: AdapterConfig = AdapterConfig()
    learner: LearnerConfig = LearnerConfig()
    publish: PublishConfig = Field(PublishConfig(), json_schema_extra=OPERATION)
    evaluation: EvaluationConfig = EvaluationConfig()
    pipeline: PipelineConfig = PipelineConfig()
    recovery: RecoveryConfig = Field(RecoveryConfig(), json_schema_extra=OPERATION)
    ray: RayConfig = Field(RayConfig(), json_schema_extra=OPERATION)
    wandb: WandbConfig = Field(WandbConfig(), json_schema_extra=OPERATION)
    dashboard: DashboardConfig = Field(DashboardConfig(), json_schema_extra=OPERATION)

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @property
    def teacher_path(self) -> str:
        return self.teacher.path or self.model.path

    @property
    def teacher_paths(self) -> dict[str, str]:
        """Of all teachers, in their order, by the fields that name them."""
        return {f"teacher.{place}path": t.path or self.model.path for place, t in self.teacher.pools.items()}

    @property
    def by_teacher(self) -> list[RunConfig]:
        """For each teacher, in their order, this run as if it were the only one."""
        pools = [{name: getattr(t, name) for name in TeacherConfig.model_fields} for t in self.teacher.pools.values()]
        alone = [
            self.teacher.model_copy(update={**pool, "path": path, "others": ()})
            for pool, path in zip(pools, self.teacher_paths.values(), strict=True)
        ]
        return [self.model_copy(update={"teacher": teacher}) for teacher in alone]

    def teacher_of(self, domain: str) -> int:
        """The number of the teacher that prompts of a domain have.

        Raises:
            ValueError: there is none; before a run the preflight says so.
        """
        number = self.teacher.serving(domain)
        if number is None:
            raise ValueError(f"no teacher is for domain {shown(domain)}; add it to the domains of one")
        return number

    @property
    def target_kind(self) -> Literal["none", "topk", "hidden"]:
        """What the teacher adds to trajectories; none: no teacher is started."""
        return self.teacher.target if self.objective.needs_teacher and not self.teaches_itself else "none"

    @property
    def teaches_itself(self) -> bool:
        """Whether the learner's own forward gives the targets: its clean tokens are read as the ARLM reads them."""
        return self.objective.needs_teacher and self.teacher.backend == "self"

    @property
    def weights_transport(self) -> Literal["object_store", "broadcast"]:
        """`publish.transport`, decided."""
        if self.publish.transport != "auto":
            return self.publish.transport
        return "broadcast" if min(self._weights_gpus) >= 1 else "object_store"

    @property
    def weights_timeout_s(self) -> float:
        """How long learner and rollout actors wait for each other: they know who is missing, so they speak before the
        pipeline's own deadline."""
        return 0.9 * self.pipeline.stage_timeout_s

    @property
    def _weights_gpus(self) -> tuple[float, float]:
        return self.learner.resources.gpus, self.rollout.resources.gpus

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """All block sizes of the run, in their order."""
        return (self.block_size, *self.block_growth.later_sizes)

    def anchored(self, folder: Path) -> RunConfig:
        """The run as a frozen student in `folder` teaches it: it reads states, and writes nothing."""
        reader = {"path": str(folder), "reads": "state", "backend": "transformers"}
        silent = {"teacher": False, "held_out_prompts": 0}
        return self.model_copy(
            update={
                "teacher": self.teacher.model_copy(update=reader),
                "evaluation": self.evaluation.model_copy(update=silent),
            }
        )

    @model_validator(mode="after")
    def _anchors_teach(self) -> RunConfig:
        if not self.block_growth.anchor:
            return self
        if not self.objective.needs_teacher:
            raise ValueError(
                "block_growth.anchor makes the student the teacher, and the objective has none; set it to false, or "
                "objective.target.kind to 'teacher'"
            )
        if self.adapter.rank:
            raise ValueError(
                f"block_growth.anchor needs whole students, and adapter.rank ({self.adapter.rank}) writes adapters; "
                "set one of them to false or 0"
            )
        if self.teacher.others:
            raise ValueError(
                f"block_growth.anchor makes the student the teacher of all domains, but there are "
                f"{len(self.teacher.pools)} teachers; set it to false, or give one teacher"
            )
        return self

    @model_validator(mode="after")
    def _blocks_grow(self) -> RunConfig:
        for size, later in pairwise(self.block_sizes):
            if later <= size or later % size:
                raise ValueError(
                    f"block_growth.sizes {self.block_growth.later_sizes}: {later} is no larger multiple of the block "
                    f"size before it ({size}); use e.g. {2 * size}"
                )
        if self.block_sizes[-1] > self.curriculum.max_tokens:
            raise ValueError(
                f"block_growth.sizes {self.block_growth.later_sizes}: {self.block_sizes[-1]} tokens are more than the "
                f"longest response, curriculum.max_tokens ({self.curriculum.max_tokens}); leave it out"
            )
        return self

    @model_validator(mode="after")
    def _broadcast_has_its_devices(self) -> RunConfig:
        learner, rollout = self._weights_gpus
        if self.publish.transport == "broadcast" and max(learner, rollout) > 0 and min(learner, rollout) < 1:
            raise ValueError(
                "publish.transport 'broadcast' needs a whole GPU for every learner rank and rollout actor, or none at "
                f"all; learner.resources.gpus is {learner:g} and rollout.resources.gpus {rollout:g}: set "
                "publish.transport to 'object_store'"
            )
        return self

    @model_validator(mode="after")
    def _block_size_divides(self) -> RunConfig:
        unmasking = self.rollout.unmasking
        if isinstance(unmasking, StaticUnmasking) and unmasking.steps_per_block:
            for size in self.block_sizes:
                if size % unmasking.steps_per_block:
                    raise ValueError(
                        f"rollout.unmasking.steps_per_block ({unmasking.steps_per_block}) does not divide block_size "
                        f"({size}); choose a divisor of block_size"
                    )
        for field in ("min_tokens", "max_tokens"):
            tokens = getattr(self.curriculum, field)
            if tokens % self.block_size:
                below = tokens // self.block_size * self.block_size
                multiples = [str(m) for m in (below, below + self.block_size) if m]
                raise ValueError(
                    f"block_size ({self.block_size}) does not divide curriculum.{field} ({tokens}); "
                    f"set curriculum.{field} to {' or '.join(multiples)}"
                )
        return self

    @model_validator(mode="after")
    def _adapter_is_trained(self) -> RunConfig:
        if not self.adapter.rank and (given := self.adapter.model_fields_set - {"rank"}):
            default = AdapterConfig()
            changed = sorted(name for name in given if getattr(self.adapter, name) != getattr(default, name))
            if changed:
                raise ValueError(
                    f"adapter.{changed[0]} ({getattr(self.adapter, changed[0])!r}) is of an adapter, but adapter.rank "
                    "is 0, so there is none; set adapter.rank to e.g. 32"
                )
        if self.adapter.gated and self.objective.terms.autoregressive:
            raise ValueError(
                f"objective.terms.autoregressive ({self.objective.terms.autoregressive:g}) trains how clean tokens are "
                "read, which adapter.gate 'mask' leaves as it is; set the term to 0, or the gate to 'none'"
            )
        source, extra = self.objective.source, enumerate(self.objective.extra)
        states = {"objective.state": self.objective.state, **{f"objective.extra.{i}.state": e.state for i, e in extra}}
        if isinstance(source, MixtureSource):
            states["objective.source.offline_state"] = source.offline_state
        for place, state in states.items():
            if self.adapter.gated and mixes_noise(state):
                raise ValueError(
                    f"{place} trains positions that show other tokens than the mask, at which adapter.gate 'mask' "
                    "does nothing; turn uniform_share and all_positions off, or set the gate to 'none'"
                )
        return self

    @model_validator(mode="after")
    def _original_is_in_the_student(self) -> RunConfig:
        backends = {f"teacher.{place}backend": t.backend for place, t in self.teacher.pools.items()}
        if not self.objective.needs_teacher or "self" not in backends.values():
            return self
        field = next(name for name, backend in backends.items() if backend == "self")
        aware = max(part.shape.block_aware for part in self.objective.parts)
        terms, path = self.objective.terms, self.teacher.path
        for name, value, on, remedy in (
            ("teacher.others", len(self.teacher.others), bool(self.teacher.others), "give one teacher"),
            ("adapter.rank", self.adapter.rank, not self.adapter.rank, "set it to e.g. 32, and adapter.gate to 'mask'"),
            ("adapter.gate", self.adapter.gate, not self.adapter.gated, "set it to 'mask'"),
            ("attention.context", self.attention.context, self.attention.context != "causal", "set it to 'causal'"),
            ("teacher.path", path, path not in (None, self.model.path), "leave it out"),
            ("teacher.target", self.teacher.target, self.teacher.target != "hidden", "set it to 'hidden'"),
            ("objective.target.block_aware", aware, bool(aware), "set it to 0"),
            ("objective.terms.alignment_of", terms.alignment_of, terms.aligns_layers, "set it to 'final'"),
        ):
            if on:
                raise ValueError(
                    f"{field} 'self' takes targets from the student's clean tokens, which the one original must read, "
                    f"and {name} is {value!r}; {remedy}, or set {field} to 'transformers'"
                )
        return self

    @model_validator(mode="after")
    def _held_out_prompts_are_measured(self) -> RunConfig:
        curriculum, growth = self.curriculum, self.block_growth
        gate = f"curriculum.schedule {curriculum.schedule!r}", "curriculum.gate_on to 'training'"
        blocks = f"block_growth.kind {growth.kind!r}", "block_growth.kind to 'plateau'"
        for (who, other), measures in (
            (gate, curriculum.gated and curriculum.gate_on == "held_out"),
            (blocks, isinstance(growth, AcceptanceGrowth)),
        ):
            for field, remedy in (("held_out_prompts", "256"), ("every_batches", "10")):
                if measures and not getattr(self.evaluation, field):
                    raise ValueError(
                        f"{who} measures held-out prompts, but evaluation.{field} is 0; set evaluation.{field} to e.g. "
                        f"{remedy}, or {other}"
                    )
        if isinstance(growth, AcceptanceGrowth) and self.block_size == 1:
            raise ValueError(
                "block_size (1) leaves nothing to draft, and block_growth.kind 'acceptance' measures drafts; set "
                "block_size to 2 or more, or block_growth.kind to 'plateau'"
            )
        return self

    @model_validator(mode="after")
    def _source_has_responses(self) -> RunConfig:
        if self.objective.needs_responses and self.data.responses is None:
            kinds = {f"extra.{i - 1}.source" if i else "source": p.source for i, p in enumerate(self.objective.parts)}
            field, source = next((name, source) for name, source in kinds.items() if source.kind in NEED_RESPONSES)
            raise ValueError(
                f"objective.{field}.kind {source.kind!r} needs offline responses: set data.responses to "
                "a file of questions and responses; opdlm respond makes one with the teacher"
            )
        return self

    @model_validator(mode="after")
    def _replay_has_trajectories(self) -> RunConfig:
        if not self.objective.needs_trajectories:
            return self
        if self.data.trajectories is None:
            raise ValueError(
                "objective.source.kind 'replay' needs trajectories: set data.trajectories to the folder that "
                "pipeline.spool wrote in an earlier run, such as runs/NAME/spool"
            )
        if self.block_growth.later_sizes:
            raise ValueError(
                "objective.source.kind 'replay' has rounds of one block size, but block_growth.kind is "
                f"{self.block_growth.kind!r}; set it to 'none'"
            )
        return self

    @model_validator(mode="after")
    def _terms_have_hidden_states(self) -> RunConfig:
        objective = self.objective
        for name, on in (
            ("importance_weight", objective.importance_weight),
            ("outliers", objective.routes),
            ("terms.alignment", objective.terms.alignment > 0 and not objective.terms.aligns_layers),
        ):
            if on and self.target_kind != "hidden" and not self.teaches_itself:
                raise ValueError(
                    f"objective.{name} needs the teacher's whole distribution or hidden states, teacher.target is "
                    f"{self.teacher.target!r}; set teacher.target to 'hidden', or turn objective.{name} off"
                )
        return self

    @model_validator(mode="after")
    def _layers_can_be_aligned(self) -> RunConfig:
        if not self.objective.terms.aligns_layers:
            return self
        for field, on, remedy in (
            ("learner.gradient_checkpointing", self.learner.gradient_checkpointing, "false"),
            ("learner.compile", self.learner.compile, "false"),
            ("teacher.others", bool(self.teacher.others), "[]"),
            ("teacher.reads", self.teacher.reads == "state", "prefix"),
        ):
            if on:
                raise ValueError(
                    "objective.terms.alignment_of 'layers' compares what each layer gives with one ARLM, which "
                    f"{field} does not leave to it; set {field} to {remedy}, or alignment_of to 'final'"
                )
        return self

    @model_validator(mode="after")
    def _states_have_one_target(self) -> RunConfig:
        """A teacher that reads states: each position is trained in one state, which is known when the teacher reads."""
        reading = [f"teacher.{place}reads 'state'" for place, t in self.teacher.pools.items() if t.reads == "state"]
        if self.target_kind == "none":
            return self
        if self.block_growth.anchor:
            reading.append("a teacher of block_growth.anchor")
        if not reading:
            return self
        for i, part in enumerate(self.objective.parts):
            field, state = f"objective.extra.{i - 1}.state" if i else "objective.state", part.state
            several = trains_twice(state)
            if part.target.kind == "teacher" and (several or state.kind == "lift"):
                why = "trains a position in several states" if several else "chooses the state after the teacher's pass"
                raise ValueError(
                    f"{field}.kind {state.kind!r} {why}, and {reading[0]} gives a position one target; "
                    "use per_block, global, random or complementary"
                )
        for field, on in (
            ("evaluation.teacher", self.evaluation.teacher and self.evaluation.problems is not None),
            ("evaluation.held_out_prompts", self.evaluation.held_out_prompts),
        ):
            if on and reading[0].startswith("teacher."):
                raise ValueError(
                    f"{field} ({on}) has the teacher write and read autoregressively, but {reading[0].split()[0]} is "
                    f"'state'; set {field} to {'false' if on is True else 0}"
                )
        return self

    @model_validator(mode="after")
    def _block_aware_teacher(self) -> RunConfig:
        aware = [part.shape.block_aware for part in self.objective.parts if part.shape.block_aware]
        if not aware or self.target_kind == "none":
            return self
        for field, on, remedy in (
            ("teacher.target 'hidden'", self.target_kind == "hidden", "teacher.target to 'topk'"),
            ("teacher.reads 'state'", any(t.reads == "state" for t in self.teacher.pools.values()), "it to 'prefix'"),
            ("block_growth.anchor", self.block_growth.anchor, "it to false"),
        ):
            if on:
                raise ValueError(
                    f"objective.target.block_aware ({aware[0]:g}) scores branches of the teacher's best tokens, which "
                    f"{field} does not do; set {remedy}, or block_aware to 0"
                )
        return self

    @model_validator(mode="after")
    def _target_fits_divergence(self) -> RunConfig:
        if self.target_kind != "topk":
            return self
        for i, objective in enumerate(self.objective.parts):
            place = f"objective.extra.{i - 1}" if i else "objective"
            if objective.divergence.kind != "forward_kl" and objective.topk_tail != "bucket":
                raise ValueError(
                    f"{place}.divergence.kind {objective.divergence.kind!r} needs the student's mass outside "
                    "the teacher's top-k: set objective.topk_tail to 'bucket' or teacher.target to 'hidden'"
                )
            target = objective.target
            if target.kind == "teacher" and target.reshapes and not 1 <= target.top_k <= self.teacher.top_k:
                raise ValueError(
                    f"{place}.target.top_k ({target.top_k}): teacher.target 'topk' knows the {self.teacher.top_k} best "
                    f"tokens only, so reshaping is exact only within these; set {place}.target.top_k between 1 and "
                    f"{self.teacher.top_k}, raise teacher.top_k, or set teacher.target to 'hidden'"
                )
        shapes = [part.shape for part in self.objective.parts if part.target.kind == "teacher"]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                "objective.extra: with teacher.target 'topk' the teacher reshapes its distribution for all losses at "
                "once, but their targets differ; give all the same, or set teacher.target to 'hidden'"
            )
        return self
