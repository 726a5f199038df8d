"""Responses of the frozen ARLM: offline, off-policy data, made by the engine that the teacher pool uses."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from actors.teacher.vllm_backend import build_llm, whole_prompts
from common.config.run import RunConfig, TeacherConfig
from common.ray_actor import as_ray_actor
from common.seeds import stream_key
from common.student import load_model
from common.trajectory import until_end


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_token_id: int


@dataclass(frozen=True)
class ResponseRequest:
    """One response to make: its key, which seeds it, and the prompt, int32 [n]."""

    ordinal: int
    sample: int
    prompt_ids: np.ndarray

    def seed(self, run_seed: int) -> int:
        return stream_key(run_seed, self.ordinal, self.sample) & 0x7FFFFFFF


class ResponseEngine(ABC):
    """A loaded causal LM that generates."""

    @abstractmethod
    def respond(self, requests: Sequence[ResponseRequest], sampling: Sampling, seed: int) -> list[np.ndarray]:
        """Token ids of each response, int32, with its end token; at most `max_new_tokens`."""


class VllmEngine(ResponseEngine):
    """Continuous batching; every response has a seed of its own."""

    def __init__(self, config: TeacherConfig, model_path: str) -> None:
        # a seeded request whose prompt is read in pieces rewinds its generator, which CPU generators cannot
        pieces = {} if config.resources.gpus else whole_prompts(config, model_path)
        self.llm = build_llm(config, model_path, skip_tokenizer_init=True, **pieces)

    def respond(self, requests: Sequence[ResponseRequest], sampling: Sampling, seed: int) -> list[np.ndarray]:
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=r.prompt_ids.tolist()) for r in requests]
        settings = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=[sampling.eos_token_id],
                seed=r.seed(seed),
                detokenize=False,
            )
            for r in requests
        ]
        outputs = self.llm.generate(prompts, settings, use_tqdm=False)
        return [np.asarray(o.outputs[0].token_ids, np.int32) for o in outputs]


class TransformersEngine(ResponseEngine):
    """Left-padded batches of at most `max_batched_tokens` tokens with padding, each seeded by its first response."""

    def __init__(self, config: TeacherConfig, model_path: str) -> None:
        self.device = "cuda" if config.resources.gpus and torch.cuda.is_available() else "cpu"
        self.model = load_model(model_path, getattr(torch, config.dtype), "sdpa").to(self.device)
        self.max_batched_tokens = config.max_batched_tokens

    @torch.inference_mode()
    def respond(self, requests: Sequence[ResponseRequest], sampling: Sampling, seed: int) -> list[np.ndarray]:
        longest = max(len(r.prompt_ids) for r in requests) + sampling.max_new_tokens
        rows = max(1, self.max_batched_tokens // longest)
        return [
            ids
            for first in range(0, len(requests), rows)
            for ids in self._batch(requests[first : first + rows], sampling, seed)
        ]

    def _batch(self, requests: Sequence[ResponseRequest], sampling: Sampling, seed: int) -> list[np.ndarray]:
        width = max(len(r.prompt_ids) for r in requests)
        ids = torch.full((len(requests), width), sampling.eos_token_id)
        attention = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.astype(np.int64))
            attention[row, width - len(request.prompt_ids) :] = 1
        torch.manual_seed(requests[0].seed(seed))
        greedy = sampling.temperature == 0
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=attention.to(self.device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            eos_token_id=sampling.eos_token_id,
            pad_token_id=sampling.eos_token_id,
        )
        return [until_end(row, sampling.eos_token_id) for row in out[:, width:].cpu().numpy().astype(np.int32)]


class ResponderActor:
    """One process of `opdlm respond`: constructed with the model loaded, then `respond` any number of times."""

    def __init__(self, config: TeacherConfig, model_path: str, seed: int) -> None:
        torch.set_num_threads(config.resources.threads)
        self.seed = seed
        engine = VllmEngine if config.backend == "vllm" else TransformersEngine
        self.engine: ResponseEngine = engine(config, model_path)

    def ready(self) -> dict[str, Any]:
        return {"role": "responder", "pid": os.getpid(), "node": ray.util.get_node_ip_address()}

    def respond(self, requests: list[ResponseRequest], sampling: Sampling) -> list[np.ndarray]:
        return self.engine.respond(requests, sampling, self.seed)


def as_remote(config: RunConfig) -> Any:
    return as_ray_actor(ResponderActor, config.teacher.resources)
