"""A process of `opdlm eval`: one loaded model that answers requests, chunk by chunk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from actors.evaluation.autoregressive import autoregressive_sampler, load_autoregressive
from actors.evaluation.generation import load_student, load_verifier, sampler_of
from actors.evaluation.responses import Response, responses
from actors.sampler.autoregressive import token_by_token
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.resources import Resources
from common.config.unmasking import Unmasking
from common.ray_actor import as_ray_actor

ModelKind = Literal["student", "original"]
_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class ModelSpec:
    """Which model, how it is loaded, and how many sequences are decoded together.

    `ends`: end tokens of an original, in place of its own: those of the student that it stands beside. `base`: the
    model of an adapter at `path`, in place of the one that it names. `verifier`: the original that verifies what a
    student drafts, for unmasking.verify 'base'.
    """

    kind: ModelKind
    path: str
    dtype: str
    slots: int
    ends: tuple[int, ...] | None = None
    base: str | None = None
    verifier: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Requests whose responses are handed over together."""

    index: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Answered:
    """The responses of a chunk in the order of its requests; `seconds` of decoding since the chunk before."""

    index: int
    responses: list[Response]
    seconds: float


class EvaluationWorker:
    """Life cycle: constructed with the model loaded, then `respond` any number of times, to its end each time.

    The chunks of one call are decoded as one stream of requests, so that a chunk's last sequences do not run alone.

        worker = EvaluationWorker(ModelSpec("student", "runs/tiny/checkpoints/final", "float32", slots=8), Resources())
        for answered in worker.respond([Chunk(0, requests)], StaticUnmasking(), 4, temperature=0.0, seed=0):
            print([response.text for response in answered.responses])
    """

    def __init__(self, spec: ModelSpec, resources: Resources | None) -> None:
        """`resources` None: in the caller's process, with its threads, and on its GPU where it has one."""
        self.spec = spec
        if resources is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        else:
            torch.set_num_threads(resources.threads)
            device = "cuda" if resources.gpus else "cpu"
            if resources.gpus and not torch.cuda.is_available():
                raise RuntimeError(
                    f"a GPU is reserved (--gpus), but torch {torch.__version__} cannot use one in this process; "
                    "install a CUDA build of torch that fits the driver, or use --actors"
                )
        if spec.kind == "student":
            self.model, self.tokenizer = load_student(spec.path, spec.dtype, device, spec.base)
            verifier = load_verifier(spec.verifier, spec.dtype, device) if spec.verifier else None
            self.sampler = sampler_of(self.model, self.tokenizer, block_size=None, slots=spec.slots, verifier=verifier)
        else:
            self.model, self.tokenizer = load_autoregressive(spec.path, device, spec.dtype, spec.ends)
            self.sampler = autoregressive_sampler(self.model, self.tokenizer, slots=spec.slots)

    def ready(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if self.model.device.type == "cuda" else "cpu"
        return {"role": "evaluation", "pid": os.getpid(), "device": device}

    def respond(
        self,
        chunks: Sequence[Chunk],
        unmasking: Unmasking | None,
        block_size: int | None,
        temperature: float,
        seed: int,
    ) -> Iterator[Answered]:
        """The chunks as they are done; `unmasking` and `block_size` are for a student."""
        if self.spec.kind == "original":
            decoding = token_by_token(temperature)
        else:
            assert unmasking and block_size
            self.sampler.set_block_size(block_size)
            decoding = Decoding(unmasking, temperature)
        self.sampler.seed = seed
        requests = [request for chunk in chunks for request in chunk.requests]
        if self.sampler.on_cuda:  # capture the graphs before anything is timed
            short = [replace(r, max_new_tokens=min(r.max_new_tokens, _WARM_UP_TOKENS)) for r in requests]
            list(self.sampler.generate(short[: self.spec.slots], decoding))
        chunk_of = {(r.ordinal, r.sample): chunk for chunk in chunks for r in chunk.requests}
        done: dict[int, dict[tuple[int, int], Response]] = {chunk.index: {} for chunk in chunks}
        start = time.perf_counter()
        for response in responses(self.sampler, self.tokenizer, requests, decoding):
            key = response.ordinal, response.sample
            chunk = chunk_of[key]
            answered = done[chunk.index]
            answered[key] = response
            if len(answered) == len(chunk.requests):
                ordered = [answered[r.ordinal, r.sample] for r in chunk.requests]
                yield Answered(chunk.index, ordered, time.perf_counter() - start)
                start = time.perf_counter()


def as_remote(resources: Resources) -> Any:
    return as_ray_actor(EvaluationWorker, resources)
