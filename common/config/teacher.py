"""The teachers' section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from common.config.paths import InputPath
from common.config.resources import Resources
from common.config.section import OPERATION, Section
from common.config.shown import shown
from common.config.values import MOST_PROCESSES, Dtype

MOST_TEACHERS = 64


class TeacherConfig(Section):
    """A pool of teacher actors: the frozen ARLM."""

    path: InputPath | None = Field(None, description="default: model.path")
    domains: tuple[str, ...] = Field(
        (), description="whose prompts this teacher is for, where there are several; none: those of no other teacher"
    )
    reads: Literal["prefix", "state"] = Field(
        "prefix",
        description="prefix: an ARLM, the clean tokens before each position; state: a student's folder, a diffusion "
        "teacher that reads the same masked state, with its own block size (BARD)",
    )
    backend: Literal["vllm", "transformers", "self"] = Field(
        "vllm",
        description="the engine that reads trajectories; self: none, targets are of the learner's own forward, whose "
        "clean tokens the ARLM reads where adapter.gate is 'mask' and attention.context 'causal'",
    )
    target: Literal["topk", "hidden"] = Field(
        "hidden",
        description="topk: the K best tokens and the log of the remaining mass; hidden: the final hidden state, "
        "to which the learner applies the teacher's LM head (exact full vocabulary)",
    )
    top_k: int = Field(16, ge=1, description="K of target topk")
    actors: int = Field(1, ge=1, le=MOST_PROCESSES, description="processes in the pool", json_schema_extra=OPERATION)
    dtype: Dtype = Field("bfloat16", description="of weights and activations")
    max_batched_tokens: int = Field(
        8192, ge=16, description="tokens of one teacher forward", json_schema_extra=OPERATION
    )
    max_wait_ms: float = Field(
        20.0,
        ge=0,
        le=60_000,
        description="how long a request waits for others to join its batch",
        json_schema_extra=OPERATION,
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="GPUs that hold one vLLM teacher together", json_schema_extra=OPERATION
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="vLLM's share of its GPU's memory", json_schema_extra=OPERATION
    )
    kv_cache_mib: int = Field(
        256, ge=16, le=2**24, description="vLLM's KV cache on a machine without a GPU", json_schema_extra=OPERATION
    )
    resources: Resources = Field(Resources(), json_schema_extra=OPERATION)

    @property
    def prompts_served(self) -> str:
        """Whose teacher this is, in words."""
        return ", ".join(self.domains) or "all other domains"

    @model_validator(mode="after")
    def _reads_what_its_engine_can(self) -> TeacherConfig:
        if self.reads == "state" and self.backend != "transformers":
            raise ValueError(
                f"reads 'state' needs block-causal attention, which backend {self.backend!r} does not have; set "
                "backend to 'transformers'"
            )
        return self

    @model_validator(mode="after")
    def _has_its_gpus(self) -> TeacherConfig:
        gpus = self.resources.gpus
        if self.tensor_parallel > 1 and self.backend != "vllm":
            raise ValueError(
                f"tensor_parallel ({self.tensor_parallel}) is vLLM's, but backend is {self.backend!r}; set backend to "
                "'vllm' or tensor_parallel to 1"
            )
        if gpus != self.tensor_parallel and max(gpus, self.tensor_parallel) > 1:
            raise ValueError(
                f"resources.gpus ({gpus:g}) is not tensor_parallel ({self.tensor_parallel}): one teacher uses as many "
                "GPUs as hold it together; set both alike, or raise teacher.actors"
            )
        return self


# what all teachers of a run have alike: the form in which targets travel
_ALIKE = ("target", "top_k", "dtype")


class TeachersConfig(TeacherConfig):
    """The teacher, or several by domain, each a pool of its own: `teacher: [{path, domains, ...}, ...]`."""

    others: tuple[TeacherConfig, ...] = Field(
        (),
        max_length=MOST_TEACHERS - 1,
        description="further teachers, each a pool of its own; what one leaves out, path and domains aside, is as in "
        "teacher",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, data: Any) -> Any:
        """A list is the first teacher with the others; one teacher, built in Python, is the only one."""
        data = first_with_others(data)
        if isinstance(data, TeacherConfig) and not isinstance(data, TeachersConfig):
            return {name: getattr(data, name) for name in data.model_fields_set}
        if not isinstance(data, Mapping) or not isinstance(data.get("others"), list | tuple):
            return data
        shared = {k: v for k, v in data.items() if k in TeacherConfig.model_fields and k not in ("path", "domains")}
        return {**data, "others": [{**shared, **o} if isinstance(o, Mapping) else o for o in data["others"]]}

    @model_validator(mode="after")
    def _deal_out_the_domains(self) -> TeachersConfig:
        owner: dict[str, str] = {}
        for place, teacher in self.pools.items():
            for name in _ALIKE if teacher is not self else ():
                if getattr(teacher, name) != getattr(self, name):
                    raise ValueError(
                        f"{place}{name} ({getattr(teacher, name)!r}) is not that of the first teacher "
                        f"({getattr(self, name)!r}), but the targets of all travel in one form; set both alike"
                    )
            for domain in teacher.domains or ("",):
                if domain in owner:
                    what = f"{shown(domain)} is" if domain else "empty, for all other domains, is"
                    raise ValueError(
                        f"{place}domains: {what} also {owner[domain]}domains, and a prompt has one teacher; take it "
                        "out of one of them"
                    )
                owner[domain] = place
        return self

    @property
    def pools(self) -> dict[str, TeacherConfig]:
        """All teachers, in their order, by how the names of their fields begin below `teacher.`."""
        return {"": self, **{f"others.{i}.": other for i, other in enumerate(self.others)}}

    def serving(self, domain: str) -> int | None:
        """The number of the teacher, from 0, that prompts of a domain have; None: there is none."""
        pools = list(self.pools.values())
        named = (i for i, teacher in enumerate(pools) if domain in teacher.domains)
        default = next((i for i, teacher in enumerate(pools) if not teacher.domains), None)
        return next(named, default)


def first_with_others(teacher: Any) -> Any:
    """A list of teachers as the first one with `others`; anything else as it is."""
    if not isinstance(teacher, list) or not teacher or not isinstance(teacher[0], Mapping):
        return teacher
    return {**teacher[0], "others": teacher[1:]}
