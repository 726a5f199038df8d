"""What a rank writes of a checkpoint: the student as a Hugging Face folder, and its shard, to go on from."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from common.config.run import RunConfig
from common.conversion import Conversion, save_student
from learner.publish import gathered_buckets
from learner.shards import HostCopy, write_shard

if TYPE_CHECKING:  # slow to import and chatty, as DeepSpeed is
    from learner.engines import Engine


class CheckpointWriter:
    """Copies what is to be written, and writes the copy in a thread while training goes on.

    `begin` gives it the student first. `save`, `write_student` and `copied_student` are collective.
    """

    engine: Engine
    conversion: Conversion

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self._student_copy, self._shard_copy = HostCopy(), HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] = self._thread.submit(lambda: None)

    def begin(self, engine: Engine, conversion: Conversion) -> None:
        self.engine, self.conversion = engine, conversion

    def reserve(self) -> None:
        """Begin to make the buffers of the shard's copy."""
        self._writing = self._thread.submit(self._shard_copy.reserve, self.engine.shard())

    def save(self, out: Path, resume: Path | None, block_size: int | None) -> None:
        """Copy the student, and this rank's shard if it is to be written into `resume`, and begin to write them."""
        state = self.copied_student()
        states = self._shard_copy.take(self.engine.shard()) if resume else {}

        def write() -> None:
            if self.rank == 0:
                self.write_copy(out, block_size, state)
            if resume:
                write_shard(resume, self.rank, self.config.learner.ranks, states)

        self._writing = self._thread.submit(write)

    def written(self) -> None:
        """Returns when all that `save` has begun is written.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        self._writing.result()

    def write_student(self, out: Path, block_size: int) -> None:
        """Write the student alone, whole; done on return."""
        state = self.copied_student()
        if self.rank == 0:
            save_student(self.engine.student, self.conversion, out, block_size, state)

    def write_copy(self, out: Path, block_size: int | None, state: dict[str, Tensor]) -> None:
        """Write a copy of the student, with what says of which base and adapter it is; rank 0 only."""
        adapter, base = self.config.adapter, self.config.model.path
        save_student(self.engine.student, self.conversion, out, block_size, state, adapter, base)

    def copied_student(self) -> dict[str, Tensor]:
        """Rank 0's copy of what is trained of the student, whole, in host memory, once the one before is written."""
        wait([self._writing])
        state: dict[str, Tensor] = {}
        for bucket in gathered_buckets(self.engine.student, self.config.publish.bucket_mib * 2**20):
            if self.rank == 0:
                state |= self._student_copy.take(dict(bucket))
        return state
