"""`opdlm respond`: the teacher's responses to the run's prompts, as a Parquet file for `data.responses`.

Chunks of prompts are dealt to the teacher processes; each finished chunk is written to FILE.parts at once, so that an
interrupted command goes on where it stood. One row per response:

| field | meaning |
| --- | --- |
| question, answer, domain | of the prompt, under the names that the config's data section gives them |
| response | text, under data.response_field |
| response_ids | list<int32>, as generated, with the end token |
| finish_reason | `eos`: ended by itself; `length`: cut off at --max-new-tokens |
| sample | 0, 1, ... for each prompt |
| tokenizer_fingerprint | the ids are valid for a tokenizer with this one |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import parquet

from actors.teacher.responder import ResponseRequest, Sampling, as_remote
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.end_tokens import response_text
from common.prompts import Prompt
from common.student import token_count, tokenizer_fingerprint
from common.trajectory import finish_reason
from deploy import preflight
from deploy.cluster import connect
from deploy.data_fingerprint import of_prompts
from deploy.errors import StuckError
from deploy.named_files import check_writable
from deploy.remote_calls import RemoteCalls

_CHUNK = 64  # prompts of one call, and of one part


def respond(
    config: RunConfig,
    output: Path,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Write the file; returns counts: responses, tokens, share_ended.

    Every distinct prompt of the run (after data.limit, one epoch) gets `samples` responses.

    Raises:
        ConfigError: the file exists, or it cannot be made as configured.
        StuckError, WorkerError: a teacher did not answer in time, or failed.
    """
    if output.suffix != ".parquet":
        raise ConfigError(f"--output: {str(output)!r} must end in .parquet")
    check_writable("--output", output.parent)
    if output.exists():
        raise ConfigError(f"--output: {str(output)!r} exists; remove it or choose another name")
    if config.teacher.backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError("teacher.backend: 'vllm' is not installed; use --teacher.backend transformers")
    preflight.check_model_folder("model.path", config.model.path)
    preflight.check_model_folder("teacher.path", config.teacher_path)
    models = preflight.check_models(config)
    tokenizer, limit, ends = models.student.tokenizer, models.positions, list(models.student.end_tokens)
    once = config.model_copy(update={"data": config.data.model_copy(update={"epochs": 1})})
    found = preflight.read_prompts(once, tokenizer)[0]
    for line in (*found.notes, *(f"{count} prompts dropped: {reason}" for reason, count in found.dropped.items())):
        note(line)
    prompts = found.prompts
    longest = max(len(p.ids) for p in prompts)
    if longest + max_new_tokens > limit:
        raise ConfigError(
            f"--max-new-tokens: {max_new_tokens} after the longest prompt ({longest} tokens) is more than the model's "
            f"{limit} positions; lower it to {limit - longest}"
        )
    _check_batch(config, longest + max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature, top_p, ends)
    parts = _parts(config, output, {**asdict(sampling), "samples": samples, "prompts": of_prompts(prompts)})
    chunks = {i: prompts[i * _CHUNK : (i + 1) * _CHUNK] for i in range(-(-len(prompts) // _CHUNK))}
    missing = {i: chunk for i, chunk in chunks.items() if not _part(parts, i).exists()}
    if missing:
        fingerprint = tokenizer_fingerprint(tokenizer)
        connect(config)
        try:
            for index, responses in _generated(config, missing, samples, sampling, token_count(tokenizer)):
                table = _table(config, tokenizer, ends, fingerprint, chunks[index], samples, responses)
                _write(table, _part(parts, index))
                note(f"{sum(_part(parts, i).exists() for i in chunks)} of {len(chunks)} parts")
        finally:
            ray.shutdown()
    table = pa.concat_tables([parquet.read_table(_part(parts, i)) for i in chunks])
    _write(table, output)
    shutil.rmtree(parts)
    return {
        "responses": len(table),
        "tokens": pc.sum(pc.list_value_length(table["response_ids"])).as_py(),
        "share_ended": pc.mean(pc.equal(table["finish_reason"], "eos")).as_py(),
    }


def _check_batch(config: RunConfig, tokens: int) -> None:
    """Without a GPU vLLM reads prompts whole, so its sequences end at one batch's tokens."""
    teacher = config.teacher
    if teacher.backend == "vllm" and not teacher.resources.gpus and tokens > teacher.max_batched_tokens:
        raise ConfigError(
            f"teacher.max_batched_tokens: {teacher.max_batched_tokens} is less than the longest prompt with its "
            f"response ({tokens} tokens), which vLLM reads in one piece on a CPU; use {tokens} or more, or lower "
            "--max-new-tokens"
        )


def _parts(config: RunConfig, output: Path, settings: dict[str, Any]) -> Path:
    """The folder of finished chunks; refuses one that other settings made."""
    folder = output.with_name(output.name + ".parts")
    settings = {**settings, "teacher": config.teacher_path, "seed": config.seed}
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise ConfigError(
            f"--output: {str(folder)!r} was left by a command with other settings: {file.read_text().strip()}; repeat "
            "it with these, or remove the folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))
    return folder


def _part(folder: Path, index: int) -> Path:
    return folder / f"part-{index:06d}.parquet"


def _write(table: pa.Table, file: Path) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    parquet.write_table(table, partial)
    partial.rename(file)


def _generated(
    config: RunConfig, chunks: dict[int, list[Prompt]], samples: int, sampling: Sampling, tokens: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(index, responses) of each chunk as it is done; every actor works on one at a time."""
    count = min(config.teacher.actors, len(chunks))
    actor_class = as_remote(config)
    arguments = (config.teacher, config.teacher_path, config.seed, tokens)
    names = {actor_class.remote(*arguments): f"teacher-{i}" for i in range(count)}
    calls = RemoteCalls(config.pipeline.stage_timeout_s)
    ready = {actor.ready.remote(): name for actor, name in names.items()}
    calls.wait(ready, "loading models", timeout_s=config.pipeline.start_timeout_s)
    idle, waiting = list(names), list(chunks)
    running: dict[ray.ObjectRef, tuple[Any, int]] = {}
    while waiting or running:
        while idle and waiting:
            actor, index = idle.pop(), waiting.pop(0)
            requests = [ResponseRequest(p.ordinal, s, p.ids) for p in chunks[index] for s in range(samples)]
            running[actor.respond.remote(requests, sampling)] = actor, index
        ready, _ = ray.wait(list(running), num_returns=1, timeout=calls.timeout_s)
        if not ready:
            stuck = ", ".join(sorted(names[actor] for actor, _ in running.values()))
            raise StuckError(f"no responses from {stuck} within {calls.timeout_s:.0f} s")
        actor, index = running.pop(ready[0])
        idle.append(actor)
        yield index, calls.result(ready[0], names[actor], "generating responses")


def _table(
    config: RunConfig,
    tokenizer: Any,
    ends: list[int],
    fingerprint: str,
    prompts: list[Prompt],
    samples: int,
    responses: list[np.ndarray],
) -> pa.Table:
    data = config.data
    of = [(p, s) for p in prompts for s in range(samples)]
    return pa.table(
        {
            data.question_field: [p.question for p, _ in of],
            data.answer_field: pa.array([p.answer for p, _ in of], pa.string()),
            data.domain_field: [p.domain for p, _ in of],
            data.response_field: [response_text(tokenizer, ids, ends) for ids in responses],
            "response_ids": pa.array([ids.tolist() for ids in responses], pa.list_(pa.int32())),
            "finish_reason": [finish_reason(ids, ends) for ids in responses],
            "sample": pa.array([s for _, s in of], pa.int32()),
            "tokenizer_fingerprint": [fingerprint] * len(of),
        }
    )
