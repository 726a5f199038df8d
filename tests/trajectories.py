"""Trajectories as a sampler could have made them, by Hypothesis or by a seed, and rows that hold many of them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from common.config.model import AttentionContext
from common.config.objective import ObjectiveConfig
from common.states import select_states
from common.trajectory import Trajectory, TrajectoryMeta
from learner.packing import MicroBatch, causal_document, coefficients, document, fill_rows, microbatch, rounded_up

EOS = 1


@st.composite
def trajectory(draw, block_size: int = 4, ordinal: int = 0) -> Trajectory:
    """Any prompt length, reveal rounds without gaps in every block, end token possibly inside the last block."""
    prompt = draw(st.integers(1, 11))
    blocks = draw(st.integers(1, 4))
    end = (prompt // block_size + blocks) * block_size
    written = end - prompt
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rounds = np.empty(written, np.int16)
    grid = np.arange(prompt, end) // block_size
    for b in np.unique(grid):
        members = np.flatnonzero(grid == b)
        steps = rng.integers(1, len(members) + 1)
        values = np.concatenate([np.arange(steps), rng.integers(0, steps, len(members) - steps)])
        rounds[members] = rng.permutation(values)
    last = int((grid == grid[-1]).sum())
    tail = draw(st.integers(0, last - 1))
    ids = rng.integers(2, 50, written).astype(np.int32)
    if tail:
        ids[written - tail - 1] = EOS
    return Trajectory(
        ordinal=ordinal,
        sample=0,
        domain=draw(st.sampled_from(["", "math"])),
        prompt_ids=rng.integers(2, 50, prompt).astype(np.int32),
        response_ids=ids[: written - tail],
        tail_ids=ids[written - tail :],
        reveal_round=rounds,
        confidence=rng.random(written).astype(np.float32),
        weights_version=3,
        finish_reason="eos" if tail else "length",
        denoise_forwards=5,
        commit_forwards=blocks - 1,
    )


def random_trajectory(rng: np.random.Generator, block_size: int, longest: int) -> Trajectory:
    """Of any length up to `longest` tokens for prompt and response each, revealed in random rounds."""
    prompt, response = rng.integers(1, longest + 1, 2)
    tail = int(-(prompt + response) % block_size)
    written = response + tail
    return Trajectory(
        ordinal=0,
        sample=0,
        prompt_ids=rng.integers(2, 50, prompt).astype(np.int32),
        response_ids=rng.integers(2, 50, response).astype(np.int32),
        tail_ids=rng.integers(2, 50, tail).astype(np.int32),
        reveal_round=rng.integers(0, block_size, written).astype(np.int16),
        confidence=rng.random(written).astype(np.float32),
        weights_version=0,
        finish_reason="length",
        denoise_forwards=1,
        commit_forwards=0,
    )


def annotated(t: Trajectory, meta: TrajectoryMeta, vocabulary: int, rng: np.random.Generator) -> None:
    """Random targets for the offsets that were asked for."""
    count, width = len(t.target_offsets), meta.target_width
    if meta.target_kind == "topk":
        mass = rng.dirichlet(np.ones(width + 1), count)
        t.topk_ids = rng.integers(0, vocabulary, count * width).astype(np.int32)
        t.topk_logprobs = np.log(mass[:, :-1]).astype(np.float32).ravel()
        t.log_tail_mass = np.log(mass[:, -1]).astype(np.float32)
    elif meta.target_kind == "hidden":
        hidden = rng.normal(size=count * width).astype(np.float32)
        t.hidden = (hidden.view(np.uint32) >> 16).astype(np.uint16) if meta.hidden_dtype == "bfloat16" else hidden


def packed_rows(
    seed: int,
    *,
    block_size: int,
    count: int,
    longest: int,
    width: int,
    rows: int,
    context: AttentionContext = "block",
) -> MicroBatch:
    """Masked and causal documents of random trajectories, packed into at most `rows` rows of about `width` tokens."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        t = random_trajectory(rng, block_size, longest)
        kind = rng.choice(["per_block", "all_rounds", "random", "complementary"])
        select_states(t, ObjectiveConfig(state={"kind": kind}), block_size, EOS, rng)
        documents.append(causal_document(t) if rng.random() < 0.2 else document(t, block_size, 60, context))
    plan = fill_rows({i: len(d) for i, d in enumerate(documents)}, width)[:rows]
    weights = dict(enumerate(coefficients(documents, "sum")))
    # a document that trains nothing is empty
    return microbatch(plan, dict(enumerate(documents)), weights, lambda longest: rounded_up(max(longest, 1), 8))
