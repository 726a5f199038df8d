"""The trajectory: the result of a rollout, and its Arrow form.

One record per trajectory. `x0 = prompt_ids + response_ids + tail_ids` ends on the block grid. The tail is what the
sampler wrote in the last block behind the first end token, or behind the length limit. It is context of that block's
states, so it is kept for exact reconstruction, but it is never trained on, and the teacher never reads it. Offsets
count from the start of the response. The same record batches are sent through Ray's object store and written to disk as
the spool.

Left out: one record per state, which would repeat the sequence and its targets for every noised copy; and columns that
may be missing. A reader refuses a schema that differs from its own, and says where.

| field | type | meaning |
| --- | --- | --- |
| ordinal, sample | int64, int32 | the key: position in the run's seeded prompt order, number of the sample |
| domain | string | of the prompt |
| prompt_ids, response_ids, tail_ids | list<int32> | token ids |
| reveal_round | list<int16> | per response and tail position: round within its block, from 0; -1 if offline |
| confidence | list<float32> | per response and tail position: probability under the raw softmax when revealed |
| weights_version | int32 | of the student that sampled it; -1: an offline response; -2: of an earlier run |
| finish_reason | string | `eos`: ends with an end token; `stop`: with a stop string; `length`: with neither |
| denoise_forwards, commit_forwards | int32 | forwards in which this sequence took part |
| state_count | int32 | noised copies |
| masked_offsets, masked_state | list<int32> | masked positions of all copies: offset and the copy it belongs to |
| shown_ids | list<int32> | what the copy shows there, with mixed noise; empty: the mask token everywhere |
| loss_weight | list<float32> | w per masked position; 0 where it is context only |
| target_offsets | list<int32> | sorted offsets that have a target |
| topk_ids | list<int32> | target `topk`: n*K token ids |
| topk_logprobs | list<float32> | target `topk`: n*K values |
| log_tail_mass | list<float32> | target `topk`: n values, log of the probability of all other tokens |
| hidden | list<uint16> or list<float32> | target `hidden`: n*d values; uint16 holds bfloat16 bits |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 3
OFFLINE = -1  # weights_version of an offline response
REPLAYED = -2  # weights_version of a rollout of an earlier run
NO_ROUND = -1  # reveal_round of an offline response

_LISTS: dict[str, pa.DataType] = {
    "prompt_ids": pa.int32(),
    "response_ids": pa.int32(),
    "tail_ids": pa.int32(),
    "reveal_round": pa.int16(),
    "confidence": pa.float32(),
    "masked_offsets": pa.int32(),
    "masked_state": pa.int32(),
    "shown_ids": pa.int32(),
    "loss_weight": pa.float32(),
    "target_offsets": pa.int32(),
    "topk_ids": pa.int32(),
    "topk_logprobs": pa.float32(),
    "log_tail_mass": pa.float32(),
}
_SCALARS: dict[str, pa.DataType] = {
    "ordinal": pa.int64(),
    "sample": pa.int32(),
    "domain": pa.string(),
    "weights_version": pa.int32(),
    "finish_reason": pa.string(),
    "denoise_forwards": pa.int32(),
    "commit_forwards": pa.int32(),
    "state_count": pa.int32(),
}

EndTokens = int | Sequence[int]  # one id, or all those of a model


def until_end(ids: np.ndarray, eos_token_id: EndTokens) -> np.ndarray:
    """`ids` int32 [n] up to and including the first end token, or all of them if there is none; a view."""
    ends = np.flatnonzero(np.isin(ids, eos_token_id))
    return ids[: ends[0] + 1] if len(ends) else ids


def finish_reason(response_ids: np.ndarray, eos_token_id: EndTokens) -> str:
    """`eos` if the response's last token is an end token, else `length`: it was cut off, by whoever made it."""
    return "eos" if np.isin(response_ids[-1:], eos_token_id).any() else "length"


def without_end(response_ids: np.ndarray, eos_token_id: EndTokens) -> np.ndarray:
    """What the response says: its ids without the end token; a view."""
    return response_ids[:-1] if finish_reason(response_ids, eos_token_id) == "eos" else response_ids


def _empty(dtype: type) -> Any:
    return field(default_factory=lambda: np.empty(0, dtype=dtype))


@dataclass
class Trajectory:
    """One trajectory; NumPy arrays with the dtypes of the table above. Targets are empty before the teacher's pass."""

    ordinal: int
    sample: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    tail_ids: np.ndarray
    reveal_round: np.ndarray
    confidence: np.ndarray
    weights_version: int
    finish_reason: str
    denoise_forwards: int
    commit_forwards: int
    domain: str = ""
    state_count: int = 0
    masked_offsets: np.ndarray = _empty(np.int32)
    masked_state: np.ndarray = _empty(np.int32)
    shown_ids: np.ndarray = _empty(np.int32)
    loss_weight: np.ndarray = _empty(np.float32)
    target_offsets: np.ndarray = _empty(np.int32)
    topk_ids: np.ndarray = _empty(np.int32)
    topk_logprobs: np.ndarray = _empty(np.float32)
    log_tail_mass: np.ndarray = _empty(np.float32)
    hidden: np.ndarray = _empty(np.float32)
    # of verified decoding, int32 [response + tail]: the draft that was tested there, -1: none; it is not stored
    draft_ids: np.ndarray = _empty(np.int32)

    @property
    def x0(self) -> np.ndarray:
        """int32 [prompt + response + tail]."""
        return np.concatenate([self.prompt_ids, self.response_ids, self.tail_ids])

    def shown_at(self, masked: np.ndarray, mask_token_id: int) -> np.ndarray | int:
        """What the copies show at some of the masked positions, which bool [masked positions] chooses: ids, or the
        mask token at all."""
        return self.shown_ids[masked] if len(self.shown_ids) else mask_token_id

    @property
    def is_offline(self) -> bool:
        """Whether this run's student did not make it: an offline response, which has no realised rounds and mask tokens
        as tail, or a rollout of an earlier run."""
        return self.weights_version in (OFFLINE, REPLAYED)

    @property
    def causal_ids(self) -> np.ndarray:
        """int32 [prompt + response]: what the teacher reads."""
        return np.concatenate([self.prompt_ids, self.response_ids])


@dataclass(frozen=True)
class TrajectoryMeta:
    """What holds for a whole record batch, stored in the schema's metadata.

    `target_kind` is `none` before the teacher's pass and for hard labels, else `topk` or `hidden`; `target_width` is
    K or d.
    """

    block_size: int
    mask_token_id: int
    tokenizer_fingerprint: str
    target_kind: str = "none"
    target_width: int = 0
    hidden_dtype: str = "float32"
    schema_version: int = SCHEMA_VERSION

    def schema(self) -> pa.Schema:
        columns = [pa.field(name, dtype, nullable=False) for name, dtype in _SCALARS.items()]
        columns += [pa.field(name, pa.list_(dtype), nullable=False) for name, dtype in _LISTS.items()]
        hidden = pa.uint16() if self.hidden_dtype == "bfloat16" else pa.float32()
        columns.append(pa.field("hidden", pa.list_(hidden), nullable=False))
        metadata = {f.name: str(getattr(self, f.name)) for f in fields(self)}
        return pa.schema(columns, metadata=metadata)

    @classmethod
    def of(cls, schema: pa.Schema) -> TrajectoryMeta:
        """Read the metadata of a schema.

        Raises:
            ValueError: a key is missing, the version is unknown, or the columns are not this version's; the message
                names the key, version or column.
        """
        raw = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        missing = [f.name for f in fields(cls) if f.name not in raw]
        if missing:
            raise ValueError(f"not a trajectory batch: schema metadata lacks {missing}")
        if int(raw["schema_version"]) != SCHEMA_VERSION:
            raise ValueError(
                f"trajectory schema_version is {raw['schema_version']}, this code reads {SCHEMA_VERSION}; "
                "read it with the release that wrote it"
            )
        meta = cls(
            block_size=int(raw["block_size"]),
            mask_token_id=int(raw["mask_token_id"]),
            tokenizer_fingerprint=raw["tokenizer_fingerprint"],
            target_kind=raw["target_kind"],
            target_width=int(raw["target_width"]),
            hidden_dtype=raw["hidden_dtype"],
        )
        expected = meta.schema()
        for name in expected.names:
            if name not in schema.names:
                raise ValueError(f"trajectory batch lacks column {name!r}")
            if schema.field(name).type != expected.field(name).type:
                raise ValueError(
                    f"trajectory column {name!r} has type {schema.field(name).type}, "
                    f"expected {expected.field(name).type}"
                )
        unknown = [name for name in schema.names if name not in expected.names]
        if unknown:
            raise ValueError(f"trajectory batch has unknown columns {unknown}")
        return meta

    def require(self, **expected: Any) -> None:
        """Raise ValueError naming the first field whose value differs from `expected`."""
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(f"trajectory batch has {name} {getattr(self, name)!r}, this run needs {value!r}")


def to_batch(trajectories: list[Trajectory], meta: TrajectoryMeta) -> pa.RecordBatch:
    """Trajectories as one Arrow record batch with the schema of `meta`."""
    schema = meta.schema()
    columns: list[pa.Array] = []
    for column in schema:
        values = [getattr(t, column.name) for t in trajectories]
        columns.append(
            _list_column(values, column.type) if pa.types.is_list(column.type) else pa.array(values, column.type)
        )
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def from_batch(batch: pa.RecordBatch) -> tuple[list[Trajectory], TrajectoryMeta]:
    """The trajectories of a record batch; their arrays are read-only views of its buffers.

    Raises:
        ValueError: the batch does not have this schema (see TrajectoryMeta.of).
    """
    meta = TrajectoryMeta.of(batch.schema)
    columns: dict[str, list[Any]] = {}
    for name in meta.schema().names:
        column = batch.column(name)
        columns[name] = _list_views(column) if pa.types.is_list(column.type) else column.to_pylist()
    rows = [Trajectory(**{name: values[i] for name, values in columns.items()}) for i in range(batch.num_rows)]
    return rows, meta


@dataclass(frozen=True)
class BatchInfo:
    """What the pipeline needs to know about a record batch, so that it need not read it."""

    keys: list[tuple[int, int]]  # (ordinal, sample)
    lengths: list[int]  # of their responses
    oldest_version: int | None  # None: all are offline responses
    offline_rows: int
    response_tokens: int
    rollout_tokens: int  # of these, generated by the student
    teacher_tokens: int
    denoise_forwards: int
    commit_forwards: int
    ended: int
    nbytes: int

    @property
    def rows(self) -> int:
        return len(self.keys)


def batch_info(batch: pa.RecordBatch) -> BatchInfo:
    """The numbers of a record batch; `teacher_tokens` are those of the trajectories that have targets."""
    trajectories, meta = from_batch(batch)
    read = [t for t in trajectories if len(t.target_offsets)] if meta.target_kind != "none" else []
    return BatchInfo(
        keys=[(t.ordinal, t.sample) for t in trajectories],
        lengths=[len(t.response_ids) for t in trajectories],
        oldest_version=min((t.weights_version for t in trajectories if not t.is_offline), default=None),
        offline_rows=sum(t.is_offline for t in trajectories),
        response_tokens=sum(len(t.response_ids) for t in trajectories),
        rollout_tokens=sum(len(t.response_ids) for t in trajectories if not t.is_offline),
        teacher_tokens=sum(len(t.causal_ids) for t in read),
        denoise_forwards=sum(t.denoise_forwards for t in trajectories),
        commit_forwards=sum(t.commit_forwards for t in trajectories),
        ended=sum(t.finish_reason == "eos" for t in trajectories),
        nbytes=batch.nbytes,
    )


def write_spool(path: Path, batches: list[pa.RecordBatch]) -> None:
    """Record batches as one Arrow IPC file; a file has one schema, so those of a teacher of another width go into one
    of their own beside it (`batch.arrow.1`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_schema: list[tuple[pa.Schema, list[pa.RecordBatch]]] = []
    for batch in batches:
        alike = next((b for schema, b in by_schema if schema.equals(batch.schema, check_metadata=True)), None)
        if alike is None:
            by_schema.append((batch.schema, [batch]))
        else:
            alike.append(batch)
    for number, (schema, alike) in enumerate(by_schema):
        with pa.ipc.new_file(str(_part(path, number)), schema) as writer:
            for batch in alike:
                writer.write_batch(batch)


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def read_spool(path: Path) -> list[pa.RecordBatch]:
    """The record batches of an Arrow IPC file and of those beside it (`write_spool`), memory-mapped.

    Raises:
        ValueError: the file is damaged, or its schema is not a trajectory schema that this code reads.
    """
    try:
        batches, number = [], 0
        while not number or _part(path, number).exists():
            reader = pa.ipc.open_file(pa.memory_map(str(_part(path, number))))
            TrajectoryMeta.of(reader.schema)
            batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
            number += 1
        return batches
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no whole Arrow IPC file ({error})") from error


def _list_column(values: list[np.ndarray], dtype: pa.ListType) -> pa.ListArray:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(v) for v in values], out=offsets[1:])
    numpy_dtype = dtype.value_type.to_pandas_dtype()
    flat = np.concatenate([np.asarray(v, dtype=numpy_dtype) for v in values]) if values else np.empty(0, numpy_dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, dtype.value_type), type=dtype)


def _list_views(column: pa.ListArray) -> list[np.ndarray]:
    offsets = column.offsets.to_numpy()
    flat = column.values.to_numpy(zero_copy_only=True)
    return [flat[start:end] for start, end in pairwise(offsets)]
