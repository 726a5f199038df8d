"""The processes of `opdlm respond` and `opdlm prompts`: they are dealt requests and give results as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import ray

from actors import responder
from actors.responder import ResponseRequest, Sampling
from actors.teacher import overlap
from common.config.errors import ConfigError
from common.config.run import RunConfig
from deploy.errors import StuckError
from deploy.remote_calls import RemoteCalls


def check_engine(config: RunConfig) -> None:
    """Refuse an engine that is not installed."""
    if config.teacher.backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError("teacher.backend: 'vllm' is not installed; use --teacher.backend transformers")


def check_room(config: RunConfig, longest_prompt: int, max_new_tokens: int, positions: int) -> None:
    """Refuse responses that do not fit, behind the longest prompt, into the model or into one batch of vLLM.

    Args:
        longest_prompt: tokens.
        positions: of the model.
    """
    tokens = longest_prompt + max_new_tokens
    if tokens > positions:
        raise ConfigError(
            f"--max-new-tokens: {max_new_tokens} after the longest prompt ({longest_prompt} tokens) is more than the "
            f"model's {positions} positions; lower it to {positions - longest_prompt}"
        )
    teacher = config.teacher
    # without a GPU vLLM reads prompts whole, so its sequences end at one batch's tokens
    if teacher.backend == "vllm" and not teacher.resources.gpus and tokens > teacher.max_batched_tokens:
        raise ConfigError(
            f"teacher.max_batched_tokens: {teacher.max_batched_tokens} is less than the longest prompt with its "
            f"response ({tokens} tokens), which vLLM reads in one piece on a CPU; use {tokens} or more, or lower "
            "--max-new-tokens"
        )


def generated(
    config: RunConfig,
    chunks: Iterable[tuple[int, list[ResponseRequest]]],
    actors: int,
    sampling: Sampling,
    token_count: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(index, responses) of each chunk as it is done.

    Args:
        token_count: ids below it have a token (common/vocabulary.py); no others are sampled.

    Raises:
        StuckError, WorkerError: a teacher did not answer in time, or failed.
    """
    actor_class = responder.as_remote(config)
    arguments = (config.teacher, config.teacher_path, config.seed, token_count)
    names = {actor_class.remote(*arguments): f"teacher-{i}" for i in range(actors)}
    work = ((index, (requests, sampling)) for index, requests in chunks)
    yield from _dealt(config, names, "respond", work, "generating responses")


def overlaps(
    config: RunConfig, chunks: Iterable[tuple[int, list[tuple[np.ndarray, np.ndarray]]]], token_count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, overlap with the student) of each chunk of prompts and responses as it is done; see OverlapActor.

    Raises:
        StuckError, WorkerError: a process did not answer in time, or failed.
    """
    actor_class = overlap.as_remote(config)
    names = {actor_class.remote(config, token_count): f"student-{i}" for i in range(config.rollout.actors)}
    work = ((index, (pairs,)) for index, pairs in chunks)
    yield from _dealt(config, names, "overlap", work, "reading responses")


def _dealt(
    config: RunConfig, names: dict[Any, str], method: str, work: Iterable[tuple[int, tuple[Any, ...]]], action: str
) -> Iterator[tuple[int, Any]]:
    """(index, result) of each call of `method` as it is done; every actor works on one at a time.

    A call is taken from `work` when an actor is free for it, so that a generator can stop when it has enough.
    """
    calls = RemoteCalls(config.pipeline.stage_timeout_s)
    starting = {actor.ready.remote(): name for actor, name in names.items()}
    calls.wait(starting, "loading models", timeout_s=config.pipeline.start_timeout_s)
    idle, waiting = list(names), iter(work)
    running: dict[ray.ObjectRef, tuple[Any, int]] = {}
    while True:
        while idle and (given := next(waiting, None)):
            actor, (index, arguments) = idle.pop(), given
            running[getattr(actor, method).remote(*arguments)] = actor, index
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1, timeout=calls.timeout_s)
        if not ready:
            stuck = ", ".join(sorted(names[actor] for actor, _ in running.values()))
            raise StuckError(f"nothing from {stuck} within {calls.timeout_s:.0f} s of {action}")
        actor, index = running.pop(ready[0])
        idle.append(actor)
        yield index, calls.result(ready[0], names[actor], action)
