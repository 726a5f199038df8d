"""From record batches to the trajectories of a rollout batch, and back."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pyarrow as pa

from common.config.run import RunConfig
from common.conversion import Conversion
from common.trajectory import Trajectory, TrajectoryMeta, from_batch, to_batch
from common.trajectory_checks import check_batch
from common.vocabulary import tokenizer_fingerprint


class RecordReader:
    """Reads record batches of one run and refuses others.

    Made once a process: the tokenizer's fingerprint hashes the whole vocabulary, which takes longer than to read a
    record batch.
    """

    def __init__(self, config: RunConfig, student: Conversion) -> None:
        self.block_sizes = config.block_sizes
        self.teacher_of = config.teacher_of
        self.vocabulary = int(student.config.vocab_size)
        self.expected = {
            "mask_token_id": student.config.mask_token_id,
            "tokenizer_fingerprint": tokenizer_fingerprint(student.tokenizer),
            "target_kind": config.target_kind,
        }

    def read(self, record_batches: list[pa.RecordBatch]) -> tuple[list[Trajectory], TrajectoryMeta]:
        """The trajectories of a rollout batch by (ordinal, sample), and what holds for all of them.

        Raises:
            ValueError: a record batch does not fit the run or the others, or holds what cannot be; names the field and
                the values.
        """
        metas = [TrajectoryMeta.of(batch.schema) for batch in record_batches]
        meta = metas[0]
        if meta.block_size not in self.block_sizes:
            raise ValueError(f"trajectory batch has block_size {meta.block_size}, not one of {self.block_sizes}")
        rows: list[Trajectory] = []
        widths: dict[int, int] = {}  # by teacher
        for batch, other in zip(record_batches, metas, strict=True):
            other.require(block_size=meta.block_size, **self.expected)
            check_batch(batch, self.vocabulary)
            of_batch = from_batch(batch)[0]
            for teacher in {self.teacher_of(t.domain) for t in of_batch}:
                other.require(target_width=widths.setdefault(teacher, other.target_width))
            rows += of_batch
        trajectories = sorted(rows, key=lambda t: (t.ordinal, t.sample))
        for before, after in pairwise(trajectories):
            if (before.ordinal, before.sample) == (after.ordinal, after.sample):
                raise ValueError(f"trajectory batches hold ordinal {after.ordinal}, sample {after.sample} twice")
        return trajectories, meta


def recorded(
    config: RunConfig, trajectories: list[Trajectory], meta: TrajectoryMeta, widths: list[int]
) -> list[pa.RecordBatch]:
    """Trajectories as record batches, one for each of their teachers; `widths` of the teachers' LM heads, if any."""
    by_teacher: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_teacher.setdefault(config.teacher_of(trajectory.domain), []).append(trajectory)
    metas = [replace(meta, target_width=width) for width in widths] or [meta] * len(config.teacher_paths)
    return [to_batch(rows, metas[teacher]) for teacher, rows in by_teacher.items()]
