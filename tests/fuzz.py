"""What comes from elsewhere, changed at random: it is refused in words that name the place, or it is possible.

    python -m tests.fuzz --count 10000            # over all kinds, in processes of their own: a crash is seen
    python -m tests.fuzz --kind records --first 4711 --count 1

A case is a number: kind and number decide everything. `records` are record batches whose values, lengths or metadata
are changed, and `spools` Arrow files with changed bytes: what is accepted must be possible by the slow rules below, and
can be packed. `prompts` are prompt files, `checkpoints` folders with manifest, model and shards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.objective import ObjectiveConfig
from common.datasets.errors import PromptError
from common.prompts import load_prompts
from common.states import select_states
from common.student import load_tokenizer
from common.trajectory import OFFLINE, Trajectory, TrajectoryMeta, from_batch, read_spool, to_batch, write_spool
from common.trajectory_checks import check_batch
from deploy.checkpoints import Checkpoints, RunState
from learner.batches import BatchBuilder
from learner.shards import check_shard, read_shard, shard_file, write_shard
from tests.trajectories import EOS, annotated, random_trajectory

SECONDS = 20  # of any one case
VOCABULARY, MASK = 64, 60
_CHUNK = 500
_NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 59, 60, 61, 63, 64, 65, 127, 255, 32767, -32768, 2**31 - 1, -(2**31)]
_REALS = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-30, 1e30, 3e38, float("inf"), float("-inf"), float("nan")]


class Wrong(AssertionError):  # noqa: N818 (what it is)
    """A case that was neither refused in words nor possible."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases, over all kinds or of one")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(run(arguments.kind, arguments.first, arguments.count)))
        return
    totals: Counter[str] = Counter()
    start = time.monotonic()
    share = -(-arguments.count // len(KINDS))
    for kind in KINDS:
        for first in range(arguments.first, arguments.first + share, _CHUNK):
            count = min(_CHUNK, arguments.first + share - first)
            command = [sys.executable, "-m", "tests.fuzz", "--kind", kind, "--first", str(first), "--count", str(count)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{kind} from {first}: status {done.returncode}\n{done.stderr[-4000:]}")
            totals.update({f"{kind} {name}": n for name, n in json.loads(done.stdout.splitlines()[-1]).items()})
    print(f"{sum(totals.values())} cases in {time.monotonic() - start:.0f} s")
    for name, number in sorted(totals.items()):
        print(f"{number:6d} {name}")


def run(kind: str, first: int, count: int) -> dict[str, int]:
    """How many cases were refused and how many were possible.

    Raises:
        Wrong: one was neither; says which.
    """
    found: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(first, first + count):
        signal.alarm(SECONDS)
        with TemporaryDirectory() as folder:
            try:
                refused = KINDS[kind](random.Random(f"{kind} {number}"), Path(folder))
            except Exception as error:
                raise Wrong(f"--kind {kind} --first {number} --count 1: {error!r}") from error
        signal.alarm(0)
        if refused is not None and not refused.strip():
            raise Wrong(f"--kind {kind} --first {number} --count 1: refused without a word")
        found["refused" if refused else "possible"] += 1
    return dict(found)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a case took more than {SECONDS} s")


# record batches


def records(rng: random.Random, folder: Path) -> str | None:
    rows, meta = _rows(rng)
    changed = _change_meta(rng, meta) if rng.random() < 0.15 else meta
    if changed == meta:
        for _ in range(rng.choice([1, 1, 1, 2])):
            _change_row(rng, rng.choice(rows))
    return _verdict([to_batch(rows, changed)])


def spools(rng: random.Random, folder: Path) -> str | None:
    rows, meta = _rows(rng)
    file = folder / "x.arrow"
    write_spool(file, [to_batch(rows, meta)])
    file.write_bytes(_changed_bytes(rng, file.read_bytes()))
    try:
        batches = read_spool(file)
    except ValueError as error:
        return str(error)
    return _verdict(batches)


def _verdict(batches: list[pa.RecordBatch]) -> str | None:
    """The refusal; or None where all is possible, and then it can be packed and made into tensors."""
    for batch in batches:
        try:
            meta = check_batch(batch, VOCABULARY)
        except ValueError as error:
            if not any(name in str(error) for name in (*meta_names(), *batch.schema.names, "not a trajectory batch")):
                raise Wrong(f"the refusal names no field: {error}") from error
            return str(error)
        rows, _ = from_batch(batch)
        for row in rows:
            if broken := impossible(row, meta):
                raise Wrong(f"accepted, but {broken}")
        head = torch.zeros(VOCABULARY, meta.target_width) if meta.target_kind == "hidden" else None
        builder = BatchBuilder(meta, "row_mean", "bucket", 256, "sdpa", torch.device("cpu"), head)
        trained = [row for row in rows if len(row.target_offsets)]
        if trained and meta.block_size <= 64:
            for micro in builder.update(trained, 0, 1)[0]:
                builder.tensors(micro, trained)
    return None


def meta_names() -> list[str]:
    return [f.name for f in fields(TrajectoryMeta)]


def impossible(t: Trajectory, meta: TrajectoryMeta) -> str:
    """What cannot be of one trajectory, by the words of common/trajectory.py and one value after the other."""
    written = len(t.response_ids) + len(t.tail_ids)
    ids = [*t.prompt_ids, *t.response_ids, *t.tail_ids]
    trained = [int(o) for o, w in zip(t.masked_offsets, t.loss_weight, strict=False) if w > 0]
    n, width = len(t.target_offsets), meta.target_width
    blocks: dict[int, list[int]] = {}
    if len(t.reveal_round) == written:
        for i, reveal in enumerate(t.reveal_round):
            blocks.setdefault((len(t.prompt_ids) + i) // meta.block_size, []).append(int(reveal))
    order = list(zip(t.masked_state.tolist(), t.masked_offsets.tolist(), strict=False))
    wrong = {
        "a key is negative": min(t.ordinal, t.sample) < 0 or t.weights_version < OFFLINE,
        "a count is negative": min(t.denoise_forwards, t.commit_forwards, t.state_count) < 0,
        "finish_reason": t.finish_reason not in ("eos", "stop", "length"),
        "an id is no token": any(not 0 <= i < VOCABULARY for i in ids),
        "the response is masked": meta.mask_token_id in t.response_ids,
        "the end is off the grid": len(ids) % meta.block_size != 0,
        "lengths differ": not len(t.reveal_round) == len(t.confidence) == written,
        "a confidence": not all(0 <= c <= 1.001 for c in t.confidence),
        "rounds": any(
            set(r) != ({-1} if t.is_offline else set(range(max(r) + 1))) or len(r) > meta.block_size
            for r in blocks.values()
        ),
        "shown": len(t.shown_ids) not in (0, len(t.masked_offsets))
        or any(not 0 <= i < VOCABULARY for i in t.shown_ids),
        "masked lengths": not len(t.masked_offsets) == len(t.masked_state) == len(t.loss_weight),
        "masked order": order != sorted(set(order)),
        "states": {s for s, _ in order} != set(range(min(t.state_count, 1000))),
        "masked range": any(not (0 <= s < t.state_count and 0 <= o < written) for s, o in order),
        "weights": not all(0 <= w < float("inf") for w in t.loss_weight),
        "the tail is trained": any(o >= len(t.response_ids) for o in trained),
        "targets": t.target_offsets.tolist() != sorted(set(t.target_offsets.tolist())),
        "missing targets": not set(trained) <= set(t.target_offsets.tolist()),
        "targets outside": any(not 0 <= o < len(t.response_ids) for o in t.target_offsets),
        "target lengths": [len(t.topk_ids), len(t.topk_logprobs), len(t.log_tail_mass), len(t.hidden)]
        != {"topk": [n * width, n * width, n, 0], "hidden": [0, 0, 0, n * width]}.get(meta.target_kind, [0] * 4),
        "target ids": any(not 0 <= i < VOCABULARY for i in t.topk_ids),
        "mass": any(
            not abs(np.exp(np.append(p, m).astype(np.float64)).sum() - 1) < 0.03
            for p, m in zip(t.topk_logprobs.reshape(n, -1) if n else [], t.log_tail_mass, strict=False)
        ),
        "hidden": not np.isfinite(
            (t.hidden.astype(np.uint32) << 16).view(np.float32) if t.hidden.dtype == np.uint16 else t.hidden
        ).all(),
    }
    return next((said for said, is_so in wrong.items() if is_so), "")


def _rows(rng: random.Random) -> tuple[list[Trajectory], TrajectoryMeta]:
    numbers = np.random.default_rng(rng.randrange(2**32))
    kind, width = rng.choice([("none", 0), ("topk", 3), ("hidden", 5)])
    dtype = rng.choice(["float32", "bfloat16"]) if kind == "hidden" else "float32"
    meta = TrajectoryMeta(rng.choice([1, 2, 4, 8]), MASK, "abc", kind, width, dtype)
    rows = []
    for ordinal in range(rng.choice([1, 2, 4])):
        t = random_trajectory(numbers, meta.block_size, 12)
        t.ordinal = ordinal
        t.reveal_round = _without_gaps(t, meta.block_size)
        state = rng.choice(["per_block", "global", "all_rounds", "random", "complementary"])
        select_states(t, ObjectiveConfig(state={"kind": state}), meta.block_size, EOS, numbers)
        annotated(t, meta, VOCABULARY, numbers)
        rows.append(t)
    check_batch(to_batch(rows, meta), VOCABULARY)
    return rows, meta


def _without_gaps(t: Trajectory, size: int) -> np.ndarray:
    block = (len(t.prompt_ids) + np.arange(len(t.reveal_round))) // size
    return np.concatenate([np.unique(t.reveal_round[block == b], return_inverse=True)[1] for b in np.unique(block)])


def _change_row(rng: random.Random, t: Trajectory) -> None:
    name = rng.choice([f.name for f in fields(Trajectory) if f.name != "domain"])
    values = getattr(t, name)
    if name == "finish_reason":
        t.finish_reason = rng.choice(["", "end", "EOS", "stop", "x" * 1000, "名"])
    elif not isinstance(values, np.ndarray):
        setattr(t, name, rng.choice(_NUMBERS))
    else:
        values = np.array(values)
        way = rng.randrange(6)
        at = rng.randrange(len(values)) if len(values) else 0
        if way == 0:
            values = values[:at]
        elif way == 1:
            values = np.insert(values, at, values[at] if len(values) else 0)
        elif way == 2:
            values = np.delete(values, at) if len(values) else np.zeros(3, values.dtype)
        elif way == 3 and len(values):
            other = rng.randrange(len(values))
            values[[at, other]] = values[[other, at]]
        elif len(values):
            kind = values.dtype
            drawn = rng.choice(_REALS if kind.kind == "f" else _NUMBERS)
            values[at] = drawn if kind.kind == "f" else np.array(drawn, np.int64).astype(kind)
        setattr(t, name, values)


def _change_meta(rng: random.Random, meta: TrajectoryMeta) -> TrajectoryMeta:
    name = rng.choice([f.name for f in fields(meta) if f.name != "tokenizer_fingerprint"])
    choices: list[Any] = _NUMBERS
    if name == "target_kind":
        choices = ["none", "topk", "hidden", "logits", ""]
    elif name == "hidden_dtype":
        choices = ["float16", "", "int8"]  # another dtype is another schema, which to_batch cannot write
    elif name == "schema_version":
        choices = [0, 1, 2, 4, -1]
    return replace(meta, **{name: rng.choice(choices)})


# files


def _changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes overwritten, cut out, doubled or inserted, or the file cut short."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(raw)) if raw else 0
        way = rng.randrange(5)
        if way == 0:
            del raw[at:]
        elif way == 1:
            del raw[at : at + rng.randrange(1, 40)]
        elif way == 2:
            raw[at:at] = raw[at : at + rng.randrange(1, 40)]
        elif way == 3:
            raw[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif raw:
            raw[at] = rng.randrange(256)
    return bytes(raw)


@cache
def _tokenizer() -> Any:
    return load_tokenizer(load_config("tiny").model.path)


_WORDS: list[Any] = [
    "", " ", "What is 2 plus 3?", "名", "\ud800", "\x00", "x" * 5000, None, 0, 1.5, True, [], {}, ["a"], {"a": 1},
    [{"role": "user", "content": "hi"}], [{"role": "user"}], [{"role": 1, "content": 2}], float("nan"),
]  # fmt: skip


def prompts(rng: random.Random, folder: Path) -> str | None:
    rows: list[Any] = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i), "domain": "math"} for i in range(5)]
    for _ in range(rng.choice([0, 1, 2])):
        rng.choice(rows)[rng.choice(["question", "answer", "domain", "messages", "prompt", "x"])] = rng.choice(_WORDS)
    if rng.random() < 0.1:
        rows.insert(rng.randrange(5), rng.choice(_WORDS))
    suffix = rng.choice([".jsonl", ".json", ".csv", ".parquet"])
    file = folder / f"prompts{suffix}"
    try:
        data = _written(rows, suffix)
    except (pa.ArrowException, UnicodeError, TypeError, AttributeError):  # no such file can be written
        return "not written"
    file.write_bytes(_changed_bytes(rng, data) if rng.random() < 0.7 else data)
    config = DataConfig(prompts=str(file), max_prompt_tokens=200)
    try:
        found = load_prompts(config, _tokenizer(), 0)
    except PromptError as error:
        if file.name not in str(error) and "data." not in str(error):
            raise Wrong(f"the refusal names neither file nor field: {error}") from error
        return str(error)
    for prompt in found.prompts:
        if not len(prompt.ids) or len(prompt.ids) > 200 or min(prompt.ids) < 0 or max(prompt.ids) >= len(_tokenizer()):
            raise Wrong(f"prompt {prompt.ordinal} has ids {prompt.ids}")
    return None


def _written(rows: list[Any], suffix: str) -> bytes:
    import csv
    import io

    from pyarrow import parquet

    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["question", "answer", "domain"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def checkpoints(rng: random.Random, folder: Path) -> str | None:
    """A checkpoint changed after it was written is set aside for the one before. One that was made wrong, with sums
    that agree, has its shard refused."""
    made = Checkpoints(load_config("tiny", ["--output_dir", str(folder)]))
    for batches in (5, 10):
        partial = made.begin(f"batch-{batches:06d}")
        (partial / "model.safetensors").write_bytes(bytes(100))
        write_shard(partial / "resume", 0, 1, _shard())
        if batches == 10 and (from_elsewhere := rng.random() < 0.5):
            file = shard_file(partial / "resume", 0)
            file.write_bytes(_changed_bytes(rng, file.read_bytes()))
        made.finish(f"batch-{batches:06d}", RunState(batches=batches))
    newest = made.folder / "batch-000010"
    if from_elsewhere:
        return _shard_verdict(newest)
    names = ["manifest.json", "model.safetensors", "resume/rank-00000.safetensors"]
    file = newest / rng.choice(names)
    before = file.read_bytes()
    if rng.random() < 0.1:
        file.unlink()
    elif file.name == "manifest.json" and rng.random() < 0.6:
        manifest = json.loads(before)
        manifest[rng.choice([*manifest, "x"])] = rng.choice([*_WORDS[2:4], *_WORDS[6:], -5, 2**70])
        file.write_text(json.dumps(manifest))
    else:
        file.write_bytes(_changed_bytes(rng, before))
    try:
        found = made.latest()
    except ConfigError as error:
        return str(error)
    if found is None:
        raise Wrong("no checkpoint was found, nor refused")
    if found[0] != newest:
        return made.damaged[0] if made.damaged else "it is no checkpoint without its manifest"
    if file.name != "manifest.json" and file.read_bytes() != before:
        raise Wrong(f"{file.name} is another, and the checkpoint was taken")
    if not isinstance(found[1].batches, int) or found[1].batches < 0:
        raise Wrong(f"a state of {found[1].batches!r} batches")
    return _shard_verdict(newest)


def _shard() -> dict[str, torch.Tensor]:
    return {f"0.{name}": torch.arange(6.0) for name in ("weights", "exp_avg", "exp_avg_sq")} | {
        "0.step": torch.tensor(3.0)
    }


def _shard_verdict(folder: Path) -> str | None:
    try:
        tensors = read_shard(folder / "resume", 0, 1)
        check_shard({"0.weights": torch.zeros(6)}, tensors)
    except ValueError as error:
        return str(error)
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()) or tensors["0.weights"].shape != (6,):
        raise Wrong("a shard that cannot be was taken")
    return None


KINDS: dict[str, Callable[[random.Random, Path], str | None]] = {
    "records": records,
    "spools": spools,
    "prompts": prompts,
    "checkpoints": checkpoints,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
