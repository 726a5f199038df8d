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

With `keep` "best" one response of each prompt is kept (deploy/best_responses.py), and its row says why:

| field | meaning |
| --- | --- |
| correct | whether its final answer is the prompt's, in `evaluation.answer_format`; null where the prompt has none |
| hinted | it is the second try, with the answer as a hint in the prompt; its `sample` is --samples |
| overlap | share of its tokens among the student's 16 best; null where there was no choice |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from actors.responder import ResponseRequest, Sampling
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.end_tokens import response_text
from common.prompts import Prompt
from common.trajectory import finish_reason
from common.vocabulary import token_count, tokenizer_fingerprint
from deploy import preflight
from deploy.best_responses import Candidates, hinted_prompts
from deploy.cluster import connect
from deploy.data_fingerprint import of_prompts
from deploy.part_files import PartFiles
from deploy.responders import check_engine, check_room, generated, overlaps

_PART, _GPU_PART = 64, 512  # prompts of one call; more keep a GPU's batches full


def respond(
    config: RunConfig,
    output: Path,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    note: Callable[[str], None],
    keep: Literal["all", "best"] = "all",
) -> dict[str, float]:
    """Write the file; returns counts: responses, tokens, share_ended, and where the best are kept share_correct.

    Every distinct prompt of the run (after data.limit, one epoch) gets `samples` responses, of which all are kept or
    the best one.

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
    hinted = hinted_prompts(config, tokenizer, prompts) if keep == "best" else {}
    longest = max(len(p.ids) for p in [*prompts, *hinted.values()])
    for own in config.by_teacher:
        check_room(own, longest, max_new_tokens, limit)
    sampling = Sampling(max_new_tokens, temperature, top_p, ends)
    part = _GPU_PART if config.teacher.resources.gpus else _PART
    parts.open(
        {
            **asdict(sampling),
            "samples": samples,
            "part": part,
            "prompts": of_prompts(prompts),
            "teacher": " ".join(config.teacher_paths.values()),
            "seed": config.seed,
            "keep": keep,
        }
    )
    of_teacher = [list(own) for _, own in groupby(prompts, key=lambda p: config.teacher_of(p.domain))]
    chunks = dict(enumerate(own[i : i + part] for own in of_teacher for i in range(0, len(own), part)))
    writer = _Writer(config, tokenizer, ends, parts, note)
    try:
        writer.generate({i: (chunk, range(samples)) for i, chunk in chunks.items()}, sampling)
        tables = {i: parts.read(i) for i in chunks}
        if keep == "best":
            tables = _best(writer, chunks, tables, hinted, samples, sampling)
    finally:
        writer.close()
    table = pa.concat_tables([tables[i] for i in chunks])
    parts.finish(table)
    counts = {
        "responses": len(table),
        "tokens": pc.sum(pc.list_value_length(table["response_ids"])).as_py(),
        "share_ended": pc.mean(pc.equal(table["finish_reason"], "eos")).as_py(),
    }
    if keep == "best":
        counts["share_correct"] = pc.mean(pc.fill_null(table["correct"], False)).as_py()
    return counts


def _best(
    writer: _Writer,
    chunks: dict[int, list[Prompt]],
    tables: dict[int, pa.Table],
    hinted: dict[int, Prompt],
    samples: int,
    sampling: Sampling,
) -> dict[int, pa.Table]:
    """One row a prompt, with the fields that say why it was kept; second tries are parts behind the `chunks`."""
    config, parts = writer.config, writer.parts
    found = {i: Candidates(config, chunk, tables[i], samples) for i, chunk in chunks.items()}
    again = {i: [hinted[p.ordinal] for p in own.unsolved if p.ordinal in hinted] for i, own in found.items()}
    again = {i: asked for i, asked in again.items() if asked}
    writer.generate({len(chunks) + i: (asked, range(samples, samples + 1)) for i, asked in again.items()}, sampling)
    for i, asked in again.items():
        found[i].try_again(asked, parts.read(len(chunks) + i))
    compared = {i: pairs for i, own in found.items() if (pairs := own.compared())}
    nearness: dict[int, dict[int, float]] = {}
    if compared:
        writer.connect()
        work = ((i, list(pairs.values())) for i, pairs in compared.items())
        for i, shares in overlaps(config, work, token_count(writer.tokenizer)):
            nearness[i] = dict(zip(compared[i], map(float, shares), strict=True))
    return {i: own.kept(nearness.get(i, {})) for i, own in found.items()}


class _Writer:
    """Generates chunks of prompts and writes each as a part; Ray is started when the first one is missing."""

    def __init__(
        self, config: RunConfig, tokenizer: Any, ends: list[int], parts: PartFiles, note: Callable[[str], None]
    ) -> None:
        self.config, self.tokenizer, self.ends, self.parts, self.note = config, tokenizer, ends, parts, note
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.connected = False

    def generate(self, chunks: dict[int, tuple[list[Prompt], range]], sampling: Sampling) -> None:
        """The parts that are missing of `chunks`: prompts, all of one teacher, and numbers of samples by part."""
        config = self.config
        missing: dict[int, dict[int, list[ResponseRequest]]] = {}  # by teacher
        for i, (prompts, samples) in chunks.items():
            if not self.parts.has(i):
                missing.setdefault(config.teacher_of(prompts[0].domain), {})[i] = _requests(prompts, samples)
        for teacher, asked in missing.items():
            self.connect()
            own, actors = config.by_teacher[teacher], min(config.by_teacher[teacher].teacher.actors, len(asked))
            for index, responses in generated(own, asked.items(), actors, sampling, token_count(self.tokenizer)):
                table = _table(config, self.tokenizer, self.ends, self.fingerprint, *chunks[index], responses)
                self.parts.write(index, table)
                self.note(f"{sum(map(self.parts.has, chunks))} of {len(chunks)} parts")

    def connect(self) -> None:
        if not self.connected:
            connect(self.config.ray)
            self.connected = True

    def close(self) -> None:
        if self.connected:
            ray.shutdown()


def _requests(prompts: list[Prompt], samples: range) -> list[ResponseRequest]:
    return [ResponseRequest(p.ordinal, s, p.ids) for p in prompts for s in samples]


def _table(
    config: RunConfig,
    tokenizer: Any,
    ends: list[int],
    fingerprint: str,
    prompts: list[Prompt],
    samples: range,
    responses: list[np.ndarray],
) -> pa.Table:
    data = config.data
    of = [(p, s) for p in prompts for s in samples]
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
