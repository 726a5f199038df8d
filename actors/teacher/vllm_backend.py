"""The teacher on vLLM, in the actor's process: one code path for vLLM's CPU and CUDA builds.

An engine serves one kind of target. `topk` reads prompt log-probabilities; `hidden` is a pooling model whose
"embedding" of a token is its final hidden state.

Left out: vLLM's server and its engine process. Both can outlive an actor that is killed, and both send each answer
through one more process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch._dynamo

from actors.teacher.block_aware import Branch, branches, mixed
from actors.teacher.targets import (
    HiddenTargets,
    TargetRequest,
    Targets,
    TeacherBackend,
    TopkTargets,
    hidden_array,
    log_tail_mass,
)
from common.config.teacher import TeacherConfig
from common.device import device_for
from common.gguf_files import model_folder
from common.student import is_student, load_config, plain_architecture

TOKENS_PER_SLOT = 16  # vLLM gets one sequence slot for every 16 tokens of max_batched_tokens
MOST_SLOTS = 256
_CPU_PAGE = 32  # tokens of the KV cache: the least that it likes


class VllmBackend(TeacherBackend):
    """Memory: weights, the KV cache (`kv_cache_mib`, or what `gpu_memory_utilization` leaves), and for `topk` the
    logits [max_batched_tokens, V] in the model's dtype and in float32, which vLLM's own profile leaves out.
    """

    def __init__(self, config: TeacherConfig, model_path: str, tokens: int | None = None) -> None:
        self.llm = build_llm(config, model_path, **_engine_arguments(config))
        if tokens is not None:
            cut_vocabulary(self.llm, tokens)
        from vllm import SamplingParams

        self.sampling = SamplingParams(
            prompt_logprobs=config.top_k,
            logprobs=config.top_k,
            flat_logprobs=True,
            detokenize=False,
            max_tokens=1,
            temperature=0.0,
        )
        # of the tokens that are there alone: K others of a branch are of no use
        self.scoring = SamplingParams(
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            max_tokens=1,
            temperature=0.0,
            skip_reading_prefix_cache=False,
        )
        model = self.llm.llm_engine.vllm_config.model_config
        is_topk = config.target == "topk"
        super().__init__(
            kind=config.target,
            width=config.top_k if is_topk else model.get_hidden_size(),
            hidden_dtype=config.dtype,
            vocab_size=model.get_vocab_size(),
            # `topk` generates, which needs room for one more token
            max_length=model.max_model_len - is_topk,
            tokens=tokens,
        )

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def block_aware(
        self, request: TargetRequest, targets: TopkTargets, block_size: int, share: float, routed: np.ndarray
    ) -> TopkTargets:
        """Each branch is a prompt of its own: the tokens before it are in the prefix cache, up to the end of a page of
        the KV cache, and the rest of that page is read once more for each."""
        return mixed(request, targets, share, routed, partial(self._branch_scores, block_size=block_size))

    def _branch_scores(self, request: TargetRequest, candidates: np.ndarray, *, block_size: int) -> np.ndarray:
        scores = np.zeros(candidates.shape)
        found = list(branches(request, candidates, block_size))
        longest = max((b.start + len(b.ids) + 1 for b in found), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"block-aware targets need {longest} tokens of context, the teacher reads {self.max_length}: shorten "
                "data.max_prompt_tokens or curriculum.max_tokens, or, if the model allows more, raise "
                "teacher.kv_cache_mib"
            )
        if again := self._score(request, found, scores, self.scoring):
            whole = self.scoring.clone()
            whole.skip_reading_prefix_cache = True
            self._score(request, again, scores, whole)
        return scores

    def _score(
        self, request: TargetRequest, found: Sequence[Branch], scores: np.ndarray, sampling: Any
    ) -> list[Branch]:
        """Fill in the scores of branches; returns those of which a part was in the prefix cache, so that its
        log-probabilities are not known."""
        from vllm import TokensPrompt

        prompts = [np.concatenate([request.ids[: b.start], b.ids, b.following[-1:]]).tolist() for b in found]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        again = []
        for branch, output in zip(found, self.llm.generate(prompts, sampling, use_tqdm=False), strict=True):
            if output.num_cached_tokens > branch.start:
                again.append(branch)
                continue
            # of the last tokens: of those in the cache some versions of vLLM give no values, others any
            scores[branch.row, branch.column] = np.sum(output.prompt_logprobs.logprobs[-len(branch.ids) :])
        return again

    def _forward(self, requests: Sequence[TargetRequest]) -> list[Targets]:
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=r.ids.tolist()) for r in requests]
        rows = [r.positions - 1 for r in requests]
        if self.kind == "hidden":
            pooled = self.llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
            states = [output.outputs.data for output in pooled]
            return [
                HiddenTargets(hidden_array(state[row], self.hidden_dtype))
                for state, row in zip(states, rows, strict=True)
            ]
        generated = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        return [self._topk(output, row) for output, row in zip(generated, rows, strict=True)]

    def _topk(self, output: Any, rows: np.ndarray) -> TopkTargets:
        # entries for ids[1:], then those for the generated token: row r is the distribution after ids[r]
        parts = [output.prompt_logprobs, output.outputs[0].logprobs]
        width = self.width + 1  # every entry lists the actual token before the K best
        ids = np.concatenate([np.array(p.token_ids, np.int32) for p in parts]).reshape(-1, width)
        logprobs = np.concatenate([np.array(p.logprobs, np.float32) for p in parts]).reshape(-1, width)
        best = logprobs[rows, 1:]
        return TopkTargets(ids[rows, 1:], best, log_tail_mass(best))


def build_llm(config: TeacherConfig, model_path: str, **arguments: Any) -> Any:
    """The engine in this process; `arguments` are vLLM's own."""
    device_for("teacher", config.resources)  # a reserved GPU is used, or said to be unusable
    _set_environment(config.resources.threads)
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        # even in eager mode vLLM compiles a few functions: 15 s of C++ compiler at the first request
        torch._dynamo.config.disable = True
        if arguments.get("enable_prefix_caching"):  # whole pages are cached, and those for CPUs have 128 tokens
            arguments["block_size"] = _CPU_PAGE
    arguments.setdefault("load_format", "safetensors")  # no pickles, which run code when they are read
    arguments.setdefault("enable_prefix_caching", False)  # requests that need every position never read the cache
    arguments.setdefault("max_model_len", -1)  # the model's own, or as much as the KV cache holds
    model = load_config(model_path)
    return LLM(
        model_folder(model_path),
        # a student names an architecture of its own: as a teacher it is read as its family
        hf_overrides={"architectures": [plain_architecture(model)]} if is_student(model) else {},
        dtype=config.dtype,
        enforce_eager=on_cpu,
        max_num_batched_tokens=config.max_batched_tokens,
        max_num_seqs=min(MOST_SLOTS, max(1, config.max_batched_tokens // TOKENS_PER_SLOT)),
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_mib * 2**20 if on_cpu else None,
        tensor_parallel_size=config.tensor_parallel,
        # several GPUs need a process each; they end with this one
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        generation_config="vllm",
        **arguments,
    )


def cut_vocabulary(llm: Any, tokens: int) -> None:
    """From now on the engine's logits are those of the first `tokens` ids."""

    def cut(model: Any) -> None:
        model.logits_processor.org_vocab_size = tokens

    llm.apply_model(cut)


def whole_prompts(config: TeacherConfig, model_path: str) -> dict[str, Any]:
    """Arguments that make vLLM read each prompt in one piece, which limits sequences to `max_batched_tokens`."""
    positions = load_config(model_path).max_position_embeddings
    return {"enable_chunked_prefill": False, "max_model_len": min(positions, config.max_batched_tokens)}


def _engine_arguments(config: TeacherConfig) -> dict[str, Any]:
    if config.target == "topk":
        # block-aware targets read the cache
        return {"skip_tokenizer_init": True, "max_logprobs": config.top_k, "enable_prefix_caching": True}
    from vllm.config import PoolerConfig

    return {"runner": "pooling", "pooler_config": PoolerConfig(task="token_embed", use_activation=False)}


def _set_environment(threads: int) -> None:
    """Set the variables that vLLM reads when it is imported."""
    # in this process: a child would bind itself to cores that others use, and could outlive a killed actor
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # its warnings about chat templates and thread binding are for servers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
