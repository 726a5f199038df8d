"""From record batches to the trajectories of a rollout batch."""

from __future__ import annotations

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from common.config.run import RunConfig
from common.trajectory import Trajectory, TrajectoryMeta, from_batch
from common.vocabulary import tokenizer_fingerprint


class RecordReader:
    """Reads record batches of one run and refuses others.

    Made once a process: the tokenizer's fingerprint hashes the whole vocabulary, which takes longer than to read a
    record batch.
    """

    def __init__(self, config: RunConfig, mask_token_id: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.block_sizes = config.block_sizes
        self.expected = {
            "mask_token_id": mask_token_id,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "target_kind": config.target_kind,
        }

    def read(self, record_batches: list[pa.RecordBatch]) -> tuple[list[Trajectory], TrajectoryMeta]:
        """The trajectories of a rollout batch by (ordinal, sample), and what holds for all of them.

        Raises:
            ValueError: a record batch does not fit the run or the others; names the field and both values.
        """
        batches = [from_batch(batch) for batch in record_batches]
        meta = batches[0][1]
        if meta.block_size not in self.block_sizes:
            raise ValueError(f"trajectory batch has block_size {meta.block_size}, not one of {self.block_sizes}")
        for _, other in batches:
            other.require(block_size=meta.block_size, target_width=meta.target_width, **self.expected)
        trajectories = [t for rows, _ in batches for t in rows]
        return sorted(trajectories, key=lambda t: (t.ordinal, t.sample)), meta
