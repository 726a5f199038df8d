"""The run's configuration: one YAML file, validated here before any process starts.

Models forbid unknown keys, and every field that has a unit says it in its name or description. This module
imports neither torch nor ray, so that `--help` and `--dry-run` answer at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from common.config.dashboard import DashboardConfig
from common.config.deepspeed import check_deepspeed
from common.config.objective import ObjectiveConfig
from common.config.paths import InputPath, OutputFolder, OutputUrl, TemplateText
from common.config.recovery import RecoveryConfig
from common.config.schedule import BlockGrowth, CurriculumConfig, NoGrowth, ThresholdRamp
from common.config.section import OPERATION, Section, plain_values
from common.config.shown import shown
from common.config.wandb import WandbConfig

MOST_PROCESSES = 4096  # of one role
MOST_TEACHERS = 64
MOST_TOKENS = 10**7  # of a prompt or a response
LONGEST_WAIT_S = 10**7

Dtype = Literal["float32", "bfloat16"]
AttentionContext = Literal["block", "causal"]
AnswerFormat = Literal["answer_line", "boxed", "last_number"]  # see common/answers.py


def far_from_zero(value: float) -> float:
    if 0 < value < 1e-3:
        raise ValueError(f"{value:g} is too close to 0 to divide by; use 0, which takes the best token, or 0.001")
    return value


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(far_from_zero)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelShape(Section):
    """Sizes of a model whose files are not on this disk, for the estimates of `--dry-run`."""

    hidden_size: int = Field(gt=0, le=10**6, description="width of the residual stream")
    layers: int = Field(gt=0, le=10**4, description="decoder layers")
    heads: int = Field(gt=0, le=10**5, description="query heads")
    kv_heads: int = Field(gt=0, le=10**5, description="key and value heads")
    head_dim: int = Field(gt=0, le=10**5, description="width of one head")
    intermediate_size: int = Field(gt=0, le=10**7, description="width of the MLP")
    vocab_size: int = Field(gt=0, le=10**8, description="embedding rows")
    tied_embeddings: bool = Field(True, description="the LM head is the embedding")
    experts: int = Field(0, ge=0, le=10**5, description="experts of each layer; 0: a plain MLP")
    experts_per_token: int = Field(0, ge=0, le=10**5, description="of these, for one token")
    expert_size: int = Field(0, ge=0, le=10**7, description="width of one expert")

    @property
    def parameters(self) -> int:
        """Number of parameters of a Qwen3-like decoder of this shape (norm weights left out)."""
        return self._parameters(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that work on one token."""
        return self._parameters(self.experts_per_token)

    def _parameters(self, experts: int) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        if self.experts:
            mlp = self.hidden_size * (3 * experts * self.expert_size + self.experts)  # and the router
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.layers * (attention + mlp) + embeddings

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


class ModelConfig(Section):
    """The ARLM from which the student starts."""

    path: InputPath = Field(description="folder of a Hugging Face causal LM, its hub id, or a .gguf file")
    mask_token: str = Field(
        "auto",
        min_length=1,
        description="auto: the tokenizer's own, else one in a spare embedding row, else a token that is reserved or "
        "never occurs; new: a row is added; or a token, which exists or gets a spare row",
    )
    end_tokens: list[str] | None = Field(
        None,
        min_length=1,
        description="tokens that end a response, the one that ends a turn first; default: those of tokenizer, "
        "generation config and chat template together",
    )
    shape: ModelShape | None = Field(
        None, description="sizes for --dry-run where the model is not on this disk", json_schema_extra=OPERATION
    )


class AttentionConfig(Section):
    """What clean tokens see; noised ones see all clean tokens of earlier blocks, and their own block."""

    context: AttentionContext = Field(
        "block",
        description="block: clean tokens see their own block and all before it; causal: as in the ARLM, only what "
        "stands before them, so that one pass over clean tokens commits and verifies them (NBDiff)",
    )


class StaticUnmasking(Section):
    """Reveal the K = block_size / steps_per_block most confident positions of a block per step."""

    rule: Literal["static"] = "static"
    steps_per_block: int | None = Field(None, ge=1, description="default: block_size, one token a step")


class DynamicUnmasking(Section):
    """Reveal every position with confidence above `threshold`, and at least the `min_tokens` most confident."""

    rule: Literal["dynamic"] = "dynamic"
    threshold: float = Field(0.9, ge=0, le=1, description="confidence (probability) above which a token is revealed")
    min_tokens: int = Field(1, ge=1, description="tokens revealed per step at least")


class SequentialUnmasking(Section):
    """Reveal the leftmost `tokens_per_step` masked positions."""

    rule: Literal["sequential"] = "sequential"
    tokens_per_step: int = Field(1, ge=1, description="tokens revealed per step")


class EntropyBoundUnmasking(Section):
    """Reveal the lowest-entropy positions while their cumulated entropy stays under `bound_nats`, at least one."""

    rule: Literal["entropy_bound"] = "entropy_bound"
    bound_nats: float = Field(0.1, ge=0, description="largest cumulated entropy of one step's tokens, nats")


class AdaptiveUnmasking(Section):
    """Reveal every position whose confidence reaches a threshold that moves with the confidences seen (BACD).

    In a block's first round it is the highest confidence, later the mean confidence of the tokens that the block has
    revealed, always within the bounds; at least the most confident position is revealed.
    """

    rule: Literal["adaptive"] = "adaptive"
    lower: float = Field(0.6, ge=0, le=1, description="lower bound of the threshold")
    upper: float = Field(0.9, ge=0, le=1, description="upper bound of the threshold")

    @model_validator(mode="after")
    def _ordered(self) -> AdaptiveUnmasking:
        if self.lower > self.upper:
            raise ValueError(f"lower ({self.lower}) is above upper ({self.upper}); lower lower")
        return self


class SpeculativeUnmasking(Section):
    """Draft the rest of a block, verify it with the student's own causal reading, keep the prefix that agrees and the
    verifier's token behind it: the text is the causal reading's own. Needs attention.context causal."""

    rule: Literal["speculative"] = "speculative"
    verify: Literal["self"] = Field("self", description="who verifies: the student, read causally")
    draft_rounds: int = Field(1, ge=1, description="steps of a draft; all but the last reveal by `threshold`")
    threshold: float = Field(
        0.9, ge=0, le=1, description="confidence above which a step before the last of a draft reveals a token"
    )


Unmasking = Annotated[
    StaticUnmasking
    | DynamicUnmasking
    | SequentialUnmasking
    | EntropyBoundUnmasking
    | AdaptiveUnmasking
    | SpeculativeUnmasking,
    Field(discriminator="rule"),
]


_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(f"(?:[A-Za-z0-9.-]+/)?{_LABEL}")
_LABEL_VALUE = re.compile(f"|!?{_LABEL}|!?in\\({_LABEL}(?:, ?{_LABEL})*\\)")


class Resources(Section):
    """What one process of a role reserves from Ray. Fractions of a GPU or CPU are allowed."""

    cpus: float = Field(1.0, ge=0, le=10**4, description="Ray CPUs per process")
    gpus: float = Field(0.0, ge=0, le=10**3, description="Ray GPUs per process: a share of one, or whole ones")
    threads: int = Field(1, ge=1, le=10**4, description="compute threads per process (OMP_NUM_THREADS)")
    labels: dict[str, str] = Field(
        {}, description="Ray node labels that its node must have, e.g. {opdlm-role: rollout}"
    )

    @model_validator(mode="after")
    def _can_be_reserved(self) -> Resources:
        if self.cpus == self.gpus == 0:
            raise ValueError("cpus and gpus are both 0, so that nothing is reserved; set cpus to 0.01 or more")
        for name, amount in (("cpus", self.cpus), ("gpus", self.gpus)):
            if 0 < amount < 1e-4:
                raise ValueError(f"{name} ({amount:g}) is less than Ray can count; use 0, or 0.0001 or more")
        if self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"gpus ({self.gpus:g}) is more than one and not whole; use {math.ceil(self.gpus)}")
        for key, value in self.labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"labels: {shown(key)}: {shown(value)} is no label of Ray; keys and values are up to 63 letters, "
                    "digits, '-', '_' and '.', a key may begin with DOMAIN/, a value may be !VALUE or in(A, B)"
                )
        return self


class RolloutConfig(Section):
    """The pool of rollout actors and how they decode."""

    actors: int = Field(2, ge=1, le=MOST_PROCESSES, description="processes in the pool", json_schema_extra=OPERATION)
    slots: int = Field(
        64, ge=1, le=2**16, description="sequences decoded at the same time in one actor", json_schema_extra=OPERATION
    )
    prompts_per_batch: int = Field(128, ge=1, le=10**6, description="prompts of one rollout batch, over all actors")
    samples_per_prompt: int = Field(1, ge=1, le=10**4, description="trajectories per prompt")
    stream_rows: int = Field(
        8, ge=1, le=10**6, description="finished trajectories per record batch sent on", json_schema_extra=OPERATION
    )
    unmasking: Unmasking = Field(DynamicUnmasking(), description="which masked positions a step reveals")
    threshold_ramp: ThresholdRamp = ThresholdRamp()
    temperature: Temperature = Field(1.0, description="of the sampling softmax; 0: argmax")
    top_k: int = Field(0, ge=0, description="sample from the K most likely tokens only; 0: off")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set with this probability; 1: off")
    max_batched_tokens: int = Field(
        16384,
        ge=1,
        description="prompt tokens of one prefill, padding included; a longer prompt is one of its own",
        json_schema_extra=OPERATION,
    )
    dtype: Dtype = Field("bfloat16", description="of weights and activations")
    compile: bool = Field(
        True,
        description="on GPUs, compile what has no kernel of its own: half a minute at first",
        json_schema_extra=OPERATION,
    )
    cuda_graphs: bool = Field(True, description="on GPUs, replay passes as CUDA graphs", json_schema_extra=OPERATION)
    resources: Resources = Field(Resources(), json_schema_extra=OPERATION)

    @model_validator(mode="after")
    def _rounds_are_the_students(self) -> RolloutConfig:
        if isinstance(self.unmasking, SpeculativeUnmasking):
            raise ValueError(
                "unmasking.rule 'speculative' is for generation and evaluation: it writes the text of the causal "
                "reading, not the student's own; choose another rule for rollouts"
            )
        return self

    @model_validator(mode="after")
    def _ramp_has_a_threshold(self) -> RolloutConfig:
        if self.threshold_ramp.end is not None and not isinstance(self.unmasking, DynamicUnmasking):
            raise ValueError(
                f"threshold_ramp.end ({self.threshold_ramp.end}) ramps the threshold of unmasking.rule dynamic, but "
                f"the rule is {self.unmasking.rule!r}; set threshold_ramp.end to null or the rule to dynamic"
            )
        return self


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
    backend: Literal["vllm", "transformers"] = Field("vllm", description="the engine that reads trajectories")
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


class DataConfig(Section):
    """Prompts of the run, and how they are asked; held-out problems are asked in the same way."""

    prompts: InputPath = Field(
        description="JSON, JSONL, CSV or Parquet file (also .gz or .zst), a folder of them or of save_to_disk, or the "
        "hub id of a data set; relative paths begin at the current folder, and what is not there is looked for among "
        "the project's own files"
    )
    split: str | None = Field(None, description="which split, where the folder or data set has several; all: every one")
    subset: str | None = Field(None, description="which subset (configuration), where a data set has several")
    question_field: str = Field("question", description="field of a record that holds the prompt")
    domain_field: str = Field("domain", description="field that holds the domain, where known")
    answer_field: str = Field("answer", description="field that holds the answer; used in evaluation only")
    assistant_turn: Literal["auto", "start", "response"] = Field(
        "auto",
        description="what an assistant turn at the end of a row's messages is: the start of the response, which is "
        "kept, or a whole response, which is left out; auto: a start if it is marked so or ends openly",
    )
    templates: dict[str, str] = Field(
        {}, description="what the user says by domain, with {question} in it; `default` is for all other domains"
    )
    system: str | None = Field(None, description="system turn of prompts that bring none")
    chat_template: TemplateText | None = Field(
        None,
        description="Jinja template, or its file, in place of the tokenizer's; a tokenizer without one (a base model) "
        "is asked with the user's text alone",
    )
    enable_thinking: bool = Field(False, description="passed to the chat template")
    drop_duplicates: bool = Field(False, description="drop exact copies of earlier prompts; they are counted anyway")
    max_prompt_tokens: int = Field(2000, ge=1, le=MOST_TOKENS, description="longer prompts are dropped and counted")
    epochs: int = Field(1, ge=1, le=10**4, description="passes over the prompts, each in an order of its own")
    limit: int | None = Field(None, ge=1, description="use only the first N prompts of the seeded order")
    domain_max_tokens: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="response length cap by domain, tokens"
    )
    responses: InputPath | None = Field(
        None,
        description="JSON, JSONL or Parquet file, or a folder of them, with offline responses to the questions "
        "(`opdlm respond` makes one); for objective.source offline and mixture",
    )
    trajectories: InputPath | None = Field(
        None,
        description="folder of what pipeline.spool wrote in an earlier run (runs/NAME/spool), or one of its files; for "
        "objective.source replay",
    )
    response_field: str = Field("response", description="field of a record of data.responses that holds the response")

    @model_validator(mode="after")
    def _templates_hold_the_question(self) -> DataConfig:
        for domain, template in self.templates.items():
            if "{question}" not in template:
                raise ValueError(
                    f"templates.{domain} {template!r} has no {{question}}, so no prompt would hold its question; put "
                    "{question} where it belongs"
                )
        return self


class LearnerConfig(Section):
    """The DeepSpeed ZeRO-3 learner."""

    ranks: int = Field(2, ge=1, le=MOST_PROCESSES, description="processes in the ZeRO world")
    batch_rows: int = Field(8, ge=1, description="trajectories per optimiser update, over all ranks")
    max_tokens_per_microbatch: int = Field(
        16384,
        ge=8,
        description="token budget of one packed forward on one rank, clean and noised copies counted",
        json_schema_extra=OPERATION,
    )
    lr: float = Field(1e-5, gt=0, le=1, description="AdamW learning rate after warm-up")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine or of the decay")
    lr_schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then a linear decay over the last decay_share"
    )
    decay_share: float = Field(0.2, gt=0, le=1, description="share of all updates that wsd decays over")
    warmup_batches: int = Field(5, ge=0, description="rollout batches of linear warm-up")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, le=10, description="of AdamW")
    grad_clip: float = Field(1.0, ge=0, description="global gradient norm; 0: off")
    dtype: Dtype = Field("bfloat16", description="of the forward; bfloat16 keeps float32 master weights")
    logits_chunk_rows: int = Field(
        1024, ge=1, description="masked positions per chunk of the LM head and the loss", json_schema_extra=OPERATION
    )
    freeze_embeddings: bool = Field(False, description="leave the embeddings and the LM head as they are (REPR-ALIGN)")
    gradient_checkpointing: bool = Field(
        True, description="recompute activations: less memory, a third more work", json_schema_extra=OPERATION
    )
    compile: bool = Field(
        False,
        description="on GPUs, compile the decoder layers: a third of the time for small models, half a minute at first",
        json_schema_extra=OPERATION,
    )
    liger_kernels: bool = Field(
        False,
        description="Liger's fused RMSNorm, RoPE and SwiGLU, on GPUs: a quarter less time and activation memory",
        json_schema_extra=OPERATION,
    )
    nonfinite_updates: int = Field(
        0,
        ge=0,
        description="updates that may be left out since their loss or gradient is not finite; one more ends the run, "
        "with a checkpoint",
        json_schema_extra=OPERATION,
    )
    deepspeed: dict[str, Any] = Field(
        {},
        description="DeepSpeed keys merged over the generated ones, e.g. zero_optimization.offload_optimizer; those "
        "that the learner's own fields decide are refused",
    )
    resources: Resources = Field(Resources(), json_schema_extra=OPERATION)

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed_is_ours_to_set(cls, keys: dict[str, Any]) -> dict[str, Any]:
        keys = plain_values(keys)
        check_deepspeed(keys)
        return keys

    @model_validator(mode="after")
    def _rows_cover_ranks(self) -> LearnerConfig:
        if self.batch_rows < self.ranks:
            raise ValueError(
                f"batch_rows ({self.batch_rows}) is below ranks ({self.ranks}): a rank would have no row; "
                "raise batch_rows or lower ranks"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr}); lower min_lr")
        if self.freeze_embeddings and self.weight_decay:
            raise ValueError(
                f"weight_decay ({self.weight_decay:g}) would shrink what freeze_embeddings freezes; set weight_decay "
                "to 0 or freeze_embeddings to false"
            )
        if self.liger_kernels and not self.resources.gpus:
            raise ValueError("liger_kernels need a GPU; set learner.resources.gpus to 1 or liger_kernels to false")
        if self.liger_kernels and self.compile:
            raise ValueError("compile and liger_kernels do the same work; set one of them to false")
        return self


class PublishConfig(Section):
    """How new weights travel to the rollout actors."""

    transport: Literal["auto", "object_store", "broadcast"] = Field(
        "object_store",
        description="object_store: through Ray's shared memory; broadcast: NCCL between whole GPUs, gloo between CPUs, "
        "with one more copy of the weights in learner-0; auto: broadcast where learner and rollouts have whole GPUs",
    )
    bucket_mib: int = Field(256, ge=1, le=2**20, description="largest gathered buffer, MiB; one tensor may exceed it")


class EvaluationConfig(Section):
    """Held-out problems with a checkable answer, and held-out prompts; only what is held out changes the training."""

    problems: InputPath | None = Field(None, description="file as data.prompts, with answers; none: no problems")
    split: str | None = Field(None, description="as data.split, of the problems", json_schema_extra=OPERATION)
    subset: str | None = Field(None, description="as data.subset, of the problems", json_schema_extra=OPERATION)
    count: int = Field(200, ge=1, description="first N problems of the file", json_schema_extra=OPERATION)
    max_new_tokens: int = Field(512, ge=1, description="response length limit, tokens", json_schema_extra=OPERATION)
    threshold: float = Field(
        0.9, ge=0, le=1, description="confidence threshold of the dynamic evaluation", json_schema_extra=OPERATION
    )
    every_batches: int = Field(
        0,
        ge=0,
        description="also evaluate after every N batches of training; 0: only before and after",
        json_schema_extra=OPERATION,
    )
    teacher: bool = Field(
        True, description="evaluate the greedy autoregressive teacher too", json_schema_extra=OPERATION
    )
    answer_format: AnswerFormat = Field(
        "answer_line",
        description="what counts as a response's answer: what stands after 'Answer:', the last \\boxed{}, "
        "or the last number",
        json_schema_extra=OPERATION,
    )
    held_out_prompts: int = Field(
        0,
        ge=0,
        le=10**6,
        description="prompts of data.prompts that are never trained on, for the held-out KL; 0: no held-out KL",
    )
    held_out_tokens: int = Field(
        256,
        ge=1,
        le=MOST_TOKENS,
        description="length limit of the teacher's greedy responses to the held-out prompts, tokens",
        json_schema_extra=OPERATION,
    )


class PipelineConfig(Section):
    """The control loop."""

    staleness: Literal[0, 1] = Field(
        0, description="0: strictly on-policy; 1: rollouts of the next batch overlap training on this one"
    )
    max_batches: int | None = Field(None, ge=1, description="stop after N rollout batches; default: all prompts")
    stage_timeout_s: float = Field(
        1800.0, gt=0, le=LONGEST_WAIT_S, description="deadline of every remote wait", json_schema_extra=OPERATION
    )
    start_timeout_s: float = Field(
        900.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="deadline for the actors to load their models",
        json_schema_extra=OPERATION,
    )
    checkpoint_every_minutes: float = Field(
        10.0,
        ge=0,
        le=LONGEST_WAIT_S / 60,
        description="a checkpoint after the batch in which so many minutes have passed since the last; 0: none",
        json_schema_extra=OPERATION,
    )
    checkpoint_every_batches: int = Field(
        0, ge=0, description="also one after every N batches; 0: none", json_schema_extra=OPERATION
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="older checkpoints of batches are deleted", json_schema_extra=OPERATION
    )
    copy_checkpoints_to: OutputUrl | None = Field(
        None,
        description="folder or URL (s3://, gs://, fsspec+PROTOCOL://) to which finished checkpoints are copied",
        json_schema_extra=OPERATION,
    )
    spool: bool = Field(
        False,
        description="write every trained record batch as Arrow IPC to the run's folder",
        json_schema_extra=OPERATION,
    )

    @property
    def checkpoints_while_training(self) -> bool:
        return bool(self.checkpoint_every_minutes or self.checkpoint_every_batches)


_CLUSTER = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def _is_cluster(address: str) -> str:
    match = _CLUSTER.fullmatch(address)
    if address != "auto" and (not match or not 0 < int(match[1]) < 2**16):
        raise ValueError(
            f"{shown(address)} is no address of a Ray cluster; use auto on one of its machines, or HOST:PORT as "
            "`ray start --head` prints it"
        )
    return address


class RayConfig(Section):
    """Where the actors run."""

    address: Annotated[str, AfterValidator(_is_cluster)] | None = Field(
        None, description="an existing cluster ('auto' or host:port); default: start one here"
    )
    num_cpus: int | None = Field(
        None, ge=1, le=10**5, description="CPUs of the Ray started here; default: this machine's"
    )
    placement_timeout_s: float = Field(
        300.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="deadline for a cluster to provide what the placement asks for, e.g. by autoscaling",
    )
    object_store_mib: int | None = Field(
        None,
        ge=80,
        le=2**24,
        description="object store of the Ray started here; default: what the run needs, 512 at least",
    )


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
        return self.teacher.target if self.objective.needs_teacher else "none"

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
    def _gate_is_measured(self) -> RunConfig:
        if not self.curriculum.gated or self.curriculum.gate_on != "held_out":
            return self
        for field, remedy in (("held_out_prompts", "256"), ("every_batches", "10")):
            if not getattr(self.evaluation, field):
                raise ValueError(
                    f"curriculum.schedule {self.curriculum.schedule!r} measures held-out prompts, but "
                    f"evaluation.{field} is 0; set evaluation.{field} to e.g. {remedy}, or curriculum.gate_on to "
                    "'training'"
                )
        return self

    @model_validator(mode="after")
    def _source_has_responses(self) -> RunConfig:
        if self.objective.needs_responses and self.data.responses is None:
            kinds = {f"extra.{i - 1}.source" if i else "source": p.source for i, p in enumerate(self.objective.parts)}
            needing = ("offline", "mixture")
            field, source = next((name, source) for name, source in kinds.items() if source.kind in needing)
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
            if on and self.target_kind != "hidden":
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
        """A teacher that reads states: each position is masked in one state, which is known when the teacher reads."""
        reading = [f"teacher.{place}" for place, t in self.teacher.pools.items() if t.reads == "state"]
        if not reading or self.target_kind == "none":
            return self
        for i, part in enumerate(self.objective.parts):
            field, state = f"objective.extra.{i - 1}.state" if i else "objective.state", part.state
            several = state.kind == "all_rounds" or (state.kind == "mixture" and state.visited == "all_rounds")
            if part.target.kind == "teacher" and (several or state.kind == "lift"):
                why = "masks a position in several states" if several else "chooses the state after the teacher's pass"
                raise ValueError(
                    f"{field}.kind {state.kind!r} {why}, and {reading[0]}reads 'state' gives a position one target; "
                    "use per_block, global, random or complementary"
                )
        for field, on in (
            ("evaluation.teacher", self.evaluation.teacher and self.evaluation.problems is not None),
            ("evaluation.held_out_prompts", self.evaluation.held_out_prompts),
        ):
            if on:
                raise ValueError(
                    f"{field} ({on}) has the teacher write and read autoregressively, but {reading[0]}reads is "
                    f"'state'; set {field} to {'false' if on is True else 0}"
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
        return self
