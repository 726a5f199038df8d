"""A few of the trajectories that were just trained on, as text with the divergence of each token.

The divergences are those that the loss has computed, so no further forward is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from common.trajectory import Trajectory
from learner.updater import PreparedUpdate

MAX_TOKENS = 1500  # of a response; further ones are only counted
MAX_PROMPT_CHARACTERS = 4000
_UNDECODED = "\ufffd"


def first_samples(
    update: PreparedUpdate, kl: np.ndarray, wanted: int, block_size: int
) -> list[Callable[..., dict[str, Any]]]:
    """The first `wanted` trajectories of an update, each a `rollout_sample` that lacks the tokenizer, with the target
    rows and divergences of their trained positions; `kl` float [L] is of all positions of all micro-batches."""
    docs = np.concatenate([batch.loss_doc for batch in update.batches])
    rows = np.concatenate([batch.loss_target for batch in update.batches])
    return [
        partial(
            rollout_sample,
            update.trajectories[d],
            target_rows=rows[docs == d],
            kl=kl[docs == d],
            block_size=block_size,
        )
        for d in np.unique(docs)[:wanted]
    ]


def rollout_sample(
    trajectory: Trajectory, *, target_rows: np.ndarray, kl: np.ndarray, tokenizer: Any, block_size: int
) -> dict[str, Any]:
    """One trajectory as JSON; its lists have one entry per response token.

    Args:
        target_rows: int [n], the rows of the trajectory's targets that were trained on, once for each state.
        kl: float [n], the divergence there, nats.

    Returns:
        ordinal, sample, domain, weights_version, finish_reason, forwards, block_size: as in the trajectory.
        offline: no student made it; all its rounds are 0 and it has no tail.
        prompt, prompt_tokens: text, and length in tokens.
        cut: tokens at the end that were left out. tail: tokens shown that stand behind the end token.
        tokens: texts. rounds: within the block, from 0. confidence: probability when revealed.
        kl: nats, mean over states; None where no state trained the token.
    """
    offline = trajectory.is_offline
    tail = trajectory.tail_ids[: 0 if offline else None]
    ids = np.concatenate([trajectory.response_ids, tail])
    length = min(len(ids), MAX_TOKENS)
    offsets = trajectory.target_offsets[target_rows]
    sums, counts = np.zeros(length), np.zeros(length)
    kept = offsets < length
    np.add.at(sums, offsets[kept], kl[kept])
    np.add.at(counts, offsets[kept], 1)
    prompt = tokenizer.decode(trajectory.prompt_ids.tolist())
    return {
        "ordinal": trajectory.ordinal,
        "sample": trajectory.sample,
        "domain": trajectory.domain,
        "weights_version": trajectory.weights_version,
        "finish_reason": trajectory.finish_reason,
        "offline": offline,
        "forwards": trajectory.denoise_forwards,
        "block_size": block_size,
        "prompt": prompt[:MAX_PROMPT_CHARACTERS],
        "prompt_tokens": len(trajectory.prompt_ids),
        "cut": len(ids) - length,
        "tail": max(length - len(trajectory.response_ids), 0),
        "tokens": token_texts(ids[:length], tokenizer),
        "rounds": np.maximum(trajectory.reveal_round[:length], 0).tolist(),
        "confidence": [round(float(c), 4) for c in trajectory.confidence[:length]],
        "kl": [round(s / n, 5) if n else None for s, n in zip(sums, counts, strict=True)],
    }


def token_texts(ids: np.ndarray, tokenizer: Any) -> list[str]:
    """The text of each token; where several make up one character, the last of them has it."""
    texts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        # a character has at most four bytes, so what is still incomplete after four tokens is none
        if text.endswith(_UNDECODED) and end - start < 4:
            texts.append("")
        else:
            texts.append(text)
            start = end
    return texts
