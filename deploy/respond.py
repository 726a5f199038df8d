"""`opdlm respond`: the teacher's responses to the run's prompts, as a Parquet file for `data.responses`; of several
teachers those of the one for the prompt's domain.

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

from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from actors.teacher.responder import ResponseRequest, Sampling
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.end_tokens import response_text
from common.prompts import Prompt
from common.trajectory import finish_reason
from common.vocabulary import token_count, tokenizer_fingerprint
from deploy import preflight
from deploy.cluster import connect
from deploy.data_fingerprint import of_prompts
from deploy.part_files import PartFiles
from deploy.responders import check_engine, check_room, generated

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
    parts = PartFiles(output)
    for own, field in zip(config.by_teacher, config.teacher_paths, strict=True):
        if own.teacher.reads == "state":
            raise ConfigError(
                f"{field}: {own.teacher_path!r} reads masked states and writes no responses autoregressively; name an "
                "ARLM, or use opdlm generate for a student"
            )
        check_engine(own)
    for field, path in {"model.path": config.model.path, **config.teacher_paths}.items():
        preflight.check_model_folder(field, path)
    models = preflight.check_models(config)
    tokenizer, limit, ends = models.student.tokenizer, models.positions, list(models.student.end_tokens)
    once = config.model_copy(update={"data": config.data.model_copy(update={"epochs": 1})})
    found = preflight.read_prompts(once, tokenizer)[0]
    for line in (*found.notes, *(f"{count} prompts dropped: {reason}" for reason, count in found.dropped.items())):
        note(line)
    preflight.check_domains(config, found, [])
    prompts = sorted(found.prompts, key=lambda p: config.teacher_of(p.domain))  # those of one teacher together
    for own in config.by_teacher:
        check_room(own, max(len(p.ids) for p in prompts), max_new_tokens, limit)
    sampling = Sampling(max_new_tokens, temperature, top_p, ends)
    parts.open(
        {
            **asdict(sampling),
            "samples": samples,
            "prompts": of_prompts(prompts),
            "teacher": " ".join(config.teacher_paths.values()),
            "seed": config.seed,
        }
    )
    of_teacher = [list(own) for _, own in groupby(prompts, key=lambda p: config.teacher_of(p.domain))]
    chunks = dict(enumerate(own[i : i + _CHUNK] for own in of_teacher for i in range(0, len(own), _CHUNK)))
    missing: dict[int, dict[int, list[ResponseRequest]]] = {}  # by teacher
    for i, chunk in chunks.items():
        if not parts.has(i):
            missing.setdefault(config.teacher_of(chunk[0].domain), {})[i] = _requests(chunk, samples)
    if missing:
        fingerprint = tokenizer_fingerprint(tokenizer)
        connect(config.ray)
        try:
            for teacher, asked in missing.items():
                own, actors = config.by_teacher[teacher], min(config.by_teacher[teacher].teacher.actors, len(asked))
                for index, responses in generated(own, asked.items(), actors, sampling, token_count(tokenizer)):
                    parts.write(index, _table(config, tokenizer, ends, fingerprint, chunks[index], samples, responses))
                    note(f"{sum(map(parts.has, chunks))} of {len(chunks)} parts")
        finally:
            ray.shutdown()
    table = pa.concat_tables([parts.read(i) for i in chunks])
    parts.finish(table)
    return {
        "responses": len(table),
        "tokens": pc.sum(pc.list_value_length(table["response_ids"])).as_py(),
        "share_ended": pc.mean(pc.equal(table["finish_reason"], "eos")).as_py(),
    }


def _requests(prompts: list[Prompt], samples: int) -> list[ResponseRequest]:
    return [ResponseRequest(p.ordinal, s, p.ids) for p in prompts for s in range(samples)]


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
