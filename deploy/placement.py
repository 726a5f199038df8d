"""Where every process of a run goes, and what it will need: computed from the config, without starting anything."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.config.cluster import RayConfig
from common.config.errors import ConfigError
from common.config.model import ModelShape
from common.config.resources import Resources
from common.config.run import RunConfig
from common.gguf_files import model_folder
from learner.deepspeed_config import WHOLE_ELEMENTS, keeps_whole

_BYTES = {"float32": 4, "bfloat16": 2}
_SHARD_BYTES = 12  # of a parameter: float32 weight and moments of AdamW
_RUNTIME_BYTES = 700 * 2**20  # Python, torch and Ray of one process, about
LEAST_STORE_MIB = 512
_BYTES_PER_RESPONSE_TOKEN = 26  # id, reveal round, confidence; masked offset, state, weight; target offset
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


# the fields that a role's memory grows with
_LARGEST_BY = {
    "rollout": "rollout.slots, rollout.max_batched_tokens, data.max_prompt_tokens, curriculum.max_tokens or "
    "evaluation.held_out_prompts",
    "teacher": "teacher.max_batched_tokens or teacher.kv_cache_mib",
    "learner": "learner.max_tokens_per_microbatch or learner.logits_chunk_rows, raise learner.ranks",
}


@dataclass(frozen=True)
class Process:
    """One process: its role, number, Ray resources, threads, and estimated bytes by part; `pool` is the number of a
    teacher's, `labels` those that its node must have."""

    role: str
    index: int
    cpus: float
    gpus: float
    threads: int
    memory: dict[str, int]
    pool: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Placement:
    """All processes, the payload of one rollout batch in bytes at the full response length, and the bytes of one
    checkpoint: its model, and all ranks' shards of weights and optimizer."""

    processes: list[Process]
    payload: dict[str, int]
    checkpoint: dict[str, int]
    shape: ModelShape
    teacher_shapes: list[ModelShape]

    @property
    def cpus(self) -> float:
        return sum(p.cpus for p in self.processes)

    @property
    def gpus(self) -> float:
        return sum(p.gpus for p in self.processes)


def on_cluster(config: RunConfig) -> bool:
    """Whether the run uses a Ray that exists already."""
    return ray_exists(config.ray)


def ray_exists(settings: RayConfig) -> bool:
    """Whether a Ray that exists already is used; `ray job submit` sets RAY_ADDRESS for its driver."""
    return settings.address is not None or "RAY_ADDRESS" in os.environ


def plan(config: RunConfig) -> Placement:
    """Placement and estimates.

    Raises:
        ConfigError: the model's sizes are known neither from its folder nor from model.shape.
    """
    shape = model_shape("model.path", config.model.path, config.model.shape)
    teacher_shapes = [model_shape(at, path, config.model.shape) for at, path in config.teacher_paths.items()]
    heads = dict(zip(config.teacher_paths.values(), teacher_shapes, strict=True))  # one for each folder
    learner = _learner_memory(config, shape, heads)
    processes = [
        *_processes("rollout", config.rollout.actors, config.rollout.resources, _rollout_memory(config, shape, heads)),
        *_teachers(config, teacher_shapes),
        *_processes("learner", config.learner.ranks, config.learner.resources, learner),
    ]
    trained = trained_parameters(config, shape)
    checkpoint = {"model": trained * _BYTES[config.learner.dtype], "optimizer": trained * _SHARD_BYTES}
    return Placement(processes, _payload(config, shape, teacher_shapes), checkpoint, shape, teacher_shapes)


def trained_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Of the student: what the optimizer, publishing and checkpoints hold; of a run with adapters these alone."""
    adapter = config.adapter
    return shape.adapter_parameters(adapter.rank, adapter.targets) if adapter.rank else shape.parameters


def _processes(
    role: str, count: int, resources: Resources, memory: dict[str, int], first: int = 0, pool: int = 0
) -> list[Process]:
    """`count` processes with the numbers from `first` on."""
    asked = resources.cpus, resources.gpus, resources.threads
    return [
        Process(role, i, *asked, _of_process(role, i, memory), pool, resources.labels)
        for i in range(first, first + count)
    ]


def _teachers(config: RunConfig, shapes: list[ModelShape]) -> list[Process]:
    """Pool after pool; hard labels have no teacher."""
    teachers: list[Process] = []
    for pool, (place, own) in enumerate(zip(config.teacher.pools, config.by_teacher, strict=True)):
        memory = _teacher_memory(own, shapes[pool], place)
        count = own.teacher.actors if config.target_kind != "none" else 0
        teachers += _processes("teacher", count, own.teacher.resources, memory, len(teachers), pool)
    return teachers


def learner_copy_bytes(placement: Placement) -> int:
    """Host memory of the copies from which ranks are restarted (`recovery.learner_copy`), of all ranks together: one in
    the rank, and two versions at its keeper."""
    return 3 * placement.checkpoint["optimizer"]


def learner_copy_fits(config: RunConfig, placement: Placement, available: int) -> bool:
    """Whether a machine with `available` bytes has room for these copies beside the run."""
    processes = sum(p.total_bytes for p in placement.processes if not p.gpus)
    store = object_store_mib(config, placement) * 2**20
    return processes + store + learner_copy_bytes(placement) <= available


def disk_bytes(config: RunConfig, placement: Placement) -> int:
    """What a run's checkpoints take at most: those that are kept and the next, the final model, and its anchors."""
    at_once = config.pipeline.keep_checkpoints + 1 if config.pipeline.checkpoints_while_training else 0
    models = 1 + len(config.block_growth.later_sizes) * config.block_growth.anchor
    return at_once * sum(placement.checkpoint.values()) + models * placement.checkpoint["model"]


def _of_process(role: str, index: int, memory: dict[str, int]) -> dict[str, int]:
    """What is particular to a process of a role: only the learner's first rank stages weights to publish them."""
    return memory | {"staged weights": 0} if role == "learner" and index else memory


def model_shape(field: str, path: str, fallback: ModelShape | None) -> ModelShape:
    """Sizes from the model's config.json where its folder is here, else `fallback`.

    Raises:
        ConfigError: there is neither, or the file lacks a size.
    """
    file = Path(model_folder(path)) / "config.json"
    if not file.is_file():
        if fallback is None:
            raise ConfigError(
                f"{field}: {path!r} is not a model folder on this machine and model.shape is not set; "
                "download the model and give its folder, or describe its sizes in model.shape"
            )
        return fallback
    raw = json.loads(file.read_text(encoding="utf-8"))
    missing = [name for name in _SIZES if name not in raw]
    if missing:
        raise ConfigError(
            f"{field}: {str(file)!r} lacks {', '.join(missing)}; give the folder of a decoder-only causal LM"
        )
    return ModelShape(
        hidden_size=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        experts=raw.get("num_experts") or raw.get("num_local_experts") or 0,
        experts_per_token=raw.get("num_experts_per_tok") or 0,
        expert_size=raw.get("moe_intermediate_size") or 0,
        tied_embeddings=raw.get("tie_word_embeddings", str(raw.get("model_type")).startswith("gemma")),
    )


def check_resources(placement: Placement, cpus: float, gpus: float) -> None:
    """Refuse a placement that Ray cannot hold.

    Raises:
        ConfigError: names what each role asks for, what there is, and which fields to lower.
    """
    for what, asked, available in (("CPUs", placement.cpus, cpus), ("GPUs", placement.gpus, gpus)):
        if asked > available + 1e-6:
            roles: dict[str, list[float]] = {}
            for p in placement.processes:
                roles.setdefault(p.role, []).append(p.cpus if what == "CPUs" else p.gpus)
            asks = ", ".join(f"{role} {len(each)} x {each[0]:g}" for role, each in roles.items())
            field = what.lower()
            raise ConfigError(
                f"the run asks for {asked:g} {what} ({asks}), but Ray has {available:g}; lower rollout.actors, "
                f"teacher.actors, learner.ranks or their resources.{field}, or give Ray more (ray.num_cpus, "
                "ray.address)"
            )


def check_memory(config: RunConfig, placement: Placement, available: int) -> None:
    """Refuse a run on this machine, with `available` bytes, that cannot fit whatever the estimates are off by: its
    object store alone, or a single process without a GPU, is larger.

    Raises:
        ConfigError: names what is too large and the fields to lower.
    """
    store = object_store_mib(config, placement) * 2**20
    if store > available:
        raise ConfigError(
            f"rollout.prompts_per_batch: {config.rollout.prompts_per_batch} prompts with "
            f"{config.rollout.samples_per_prompt} trajectories each of up to {config.curriculum.max_tokens} tokens, "
            f"and the weights, need an object store of {store / 2**30:,.1f} GiB; this machine has "
            f"{available / 2**30:,.1f}: lower it, rollout.samples_per_prompt or curriculum.max_tokens"
        )
    for p in placement.processes:
        if not p.gpus and p.total_bytes > available:
            part = max(p.memory, key=lambda name: p.memory[name])
            raise ConfigError(
                f"{p.role}-{p.index} needs about {p.total_bytes / 2**30:,.1f} GiB, most of it for {part}; this machine "
                f"has {available / 2**30:,.1f}: lower {_LARGEST_BY[p.role]}, or use a smaller model"
            )


def object_store_mib(config: RunConfig, placement: Placement) -> int:
    """Size of the object store where one machine has the whole run: `ray.object_store_mib`, or what it needs.

    That is two versions of the weights, since readers hold one while the next is put, and the rollout batches that may
    be under way at a time.

    Raises:
        ConfigError: ray.object_store_mib is less than the weights need: their readers would wait forever.
    """
    payload, asked = placement.payload, config.ray.object_store_mib
    weights = 2 * payload["weights"] if config.weights_transport == "object_store" else 0
    batch = payload["trajectories"] + payload.get(f"targets ({config.target_kind})", 0)
    if asked is None:
        return max(LEAST_STORE_MIB, math.ceil((weights + (config.pipeline.staleness + 1) * batch) / 2**20))
    if asked * 2**20 < weights:
        raise ConfigError(
            f"ray.object_store_mib: {asked} does not hold two versions of the weights, which are published through it; "
            f"give at least {math.ceil(weights / 2**20)}, or leave it out"
        )
    return asked


def _rollout_memory(config: RunConfig, shape: ModelShape, heads: Mapping[str, ModelShape]) -> dict[str, int]:
    width = _BYTES[config.rollout.dtype]
    longest = config.data.max_prompt_tokens + config.curriculum.max_tokens
    block_rows = config.rollout.slots * config.block_sizes[-1]
    prompts = config.rollout.slots * config.data.max_prompt_tokens
    prefill = min(max(config.rollout.max_batched_tokens, config.data.max_prompt_tokens), prompts)
    staged = config.rollout.resources.gpus or config.weights_transport == "broadcast"
    return {
        "weights": shape.parameters * width,
        "staged weights": trained_parameters(config, shape) * _BYTES[config.learner.dtype] if staged else 0,
        "adapters": _rollout_adapter_elements(config, shape) * width,
        "KV cache": config.rollout.slots * longest * shape.kv_elements_per_token * width,
        "prefill": prefill * (3 * shape.intermediate_size + 4 * shape.hidden_size) * width,  # one layer's activations
        "logits": block_rows * shape.vocab_size * 4 * 3,
        "held-out KL": _held_out_memory(config, heads),
        "runtime": _RUNTIME_BYTES,
    }


def _rollout_adapter_elements(config: RunConfig, shape: ModelShape) -> int:
    """Gated ones act beside the weights, with each B among the zeros of the packed one (twice at most); others are
    merged, and what they are merged into is kept in host memory."""
    adapter = config.adapter
    if not adapter.rank:
        return 0
    return trained_parameters(config, shape) * 2 if adapter.gated else shape.targeted_parameters(adapter.targets)


def _held_out_memory(config: RunConfig, heads: Mapping[str, ModelShape]) -> int:
    """The original's hidden states at an actor's share of the responses, and its LM head. Its weights, loaded for a
    moment at the start, and logits of some positions take the place of the KV cache and of the sampler's logits."""
    if not config.evaluation.held_out_prompts:
        return 0
    share = math.ceil(config.evaluation.held_out_prompts / config.rollout.actors)
    states = share * config.evaluation.held_out_tokens * max(teacher.hidden_size for teacher in heads.values())
    return (states + _head_elements(heads)) * _BYTES[config.teacher.dtype]


def _head_elements(heads: Mapping[str, ModelShape]) -> int:
    return sum(teacher.vocab_size * teacher.hidden_size for teacher in heads.values())


def _teacher_memory(config: RunConfig, shape: ModelShape, place: str) -> dict[str, int]:
    """On a GPU, vLLM's KV cache takes what gpu_memory_utilization leaves, which is not counted here.

    Raises:
        ConfigError: teacher.tensor_parallel does not divide the model's heads, which vLLM deals out.
    """
    width, parts = _BYTES[config.teacher.dtype], config.teacher.tensor_parallel
    if shape.heads % parts:
        raise ConfigError(
            f"teacher.{place}tensor_parallel: {parts} does not divide the {shape.heads} attention heads of the "
            "teacher, which are dealt out to the GPUs; use a divisor"
        )
    logits = config.teacher.max_batched_tokens * shape.vocab_size * (width + 4)
    own_cache = config.teacher.backend == "vllm" and not config.teacher.resources.gpus
    on_each = f" on each of {parts} GPUs" if parts > 1 else ""
    return {
        f"weights{on_each}": shape.parameters * width // parts,
        "KV cache": config.teacher.kv_cache_mib * 2**20 if own_cache else 0,
        f"logits{on_each}": logits if config.teacher.target == "topk" else 0,
        f"runtime{on_each}": _RUNTIME_BYTES,
    }


def _learner_memory(config: RunConfig, shape: ModelShape, heads: Mapping[str, ModelShape]) -> dict[str, int]:
    learner, ranks = config.learner, config.learner.ranks
    width = _BYTES[learner.dtype]
    trained = trained_parameters(config, shape)
    states = trained * (12 if learner.dtype == "bfloat16" else 8)  # Adam moments, and fp32 weights for bf16
    frozen = shape.parameters if config.adapter.rank else 0
    on_each_rank = 1 if keeps_whole(learner, shape.parameters) else ranks
    per_layer = shape.hidden_size * (2 if learner.gradient_checkpointing else 16)
    head = shape.vocab_size * shape.hidden_size
    base = heads[config.teacher_path].parameters
    teacher_heads = _head_elements(heads) * _BYTES[config.teacher.dtype]
    return {
        "weights and gradients (sharded)": 2 * trained * width // ranks,
        "frozen base of the adapters": frozen * width // on_each_rank,
        "optimiser states (sharded)": states // ranks,
        "weights kept whole": min(trained, WHOLE_ELEMENTS) * width * (ranks - 1) // ranks,
        "activations": learner.max_tokens_per_microbatch * shape.layers * per_layer * width,
        "LM head, whole, with its gradient": head * (width + 4),
        "frozen ARLM": base * width if config.objective.terms.aligns_layers else 0,
        "teacher's LM head": teacher_heads if config.target_kind == "hidden" else 0,
        "logits chunk": learner.logits_chunk_rows * shape.vocab_size * 4 * 4,
        "staged weights": trained * width if config.weights_transport == "broadcast" else 0,
        "checkpoint copy": 0 if learner.resources.gpus else host_copy_bytes(config, shape),
        "runtime": _RUNTIME_BYTES,
    }


def host_copy_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Host memory of one learner rank for what it writes while training goes on; the first also copies the model."""
    shard = trained_parameters(config, shape) * _SHARD_BYTES // config.learner.ranks
    return shard if config.pipeline.checkpoints_while_training else 0


def _payload(config: RunConfig, shape: ModelShape, teachers: list[ModelShape]) -> dict[str, int]:
    """Bytes of one rollout batch if every response has the greatest length and every position a target."""
    rows = config.rollout.prompts_per_batch * config.rollout.samples_per_prompt * len(config.objective.parts)
    response = rows * config.curriculum.max_tokens
    return {
        "trajectories": rows * config.data.max_prompt_tokens * 4 + response * _BYTES_PER_RESPONSE_TOKEN,
        "targets (topk)": response * (config.teacher.top_k * 8 + 4),
        "targets (hidden)": response * max(t.hidden_size for t in teachers) * _BYTES[config.teacher.dtype],
        "weights": trained_parameters(config, shape) * _BYTES[config.learner.dtype],
    }
