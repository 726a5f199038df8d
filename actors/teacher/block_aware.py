"""Block-aware targets (TCSM): what the teacher would say of a masked token if it knew the rest of the block.

For position i of a block that ends at e, and C the teacher's K best tokens there,

    s(c) = log p(c | x^{<i}) + sum_{j=i+1..e} log p(x_j | x^{<i}, c, x^{i+1..j-1}),    q = softmax_C s

and the target has the mass that p gives C, spread by q; all other tokens keep theirs. At i = e it is p.

Here the branches c are scored in packed forwards, [clean sequence | branches]: a branch sees the clean tokens before i,
and itself causally, so that the sequence before it is read once for all of them. The engine vLLM scores them as prompts
of their own (actors/teacher/vllm_backend.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.teacher.targets import TargetRequest, TopkTargets
from common.masks import per_layer_kind
from common.student import attention_windows, full_precision_logits, hidden_states, lm_head_weight

_BRANCH_TOKENS = 512  # of one forward, or as many as the clean sequence has: the mask grows with their square
_CLEAN = -1  # the branch of clean tokens


@dataclass(frozen=True)
class Branch:
    """Candidate number `column` at the row `row` of a request's positions: `ids` int64 [n], which stand at `start` and
    behind, and the tokens `following` int64 [n] that they predict."""

    row: int
    column: int
    start: int
    ids: np.ndarray
    following: np.ndarray


def block_aware(
    model: PreTrainedModel,
    request: TargetRequest,
    targets: TopkTargets,
    block_size: int,
    share: float,
    routed: np.ndarray,
    tokens: int | None = None,
) -> TopkTargets:
    """(1 - share) p + share times the block-aware target, best first, on the same K tokens; p where it is not `routed`.

    Args:
        request: `ids` is the whole sequence, so that the end of each block is known.
        routed: bool [n], of its positions.
        tokens: how many ids of the vocabulary count; None: all.
    """
    return mixed(
        request, targets, share, routed, lambda asked, ids: branch_scores(model, asked, ids, block_size, tokens)
    )


def mixed(
    request: TargetRequest,
    targets: TopkTargets,
    share: float,
    routed: np.ndarray,
    score: Callable[[TargetRequest, np.ndarray], np.ndarray],
) -> TopkTargets:
    """As `block_aware`; `score` gives what `branch_scores` does of a request and its candidates."""
    if not routed.any():
        return targets
    asked = TargetRequest(request.ids, request.positions[routed])
    known = torch.from_numpy(targets.logprobs[routed]).double()
    ahead = torch.from_numpy(score(asked, targets.ids[routed]))
    spread = (known + ahead).log_softmax(-1) + known.logsumexp(-1, keepdim=True)
    mixed = torch.log((1 - share) * known.exp() + share * spread.exp())
    order = mixed.argsort(dim=-1, descending=True, stable=True)
    ids, logprobs = targets.ids.copy(), targets.logprobs.copy()
    ids[routed] = np.take_along_axis(targets.ids[routed], order.numpy(), axis=-1)
    logprobs[routed] = mixed.gather(-1, order).numpy()
    return TopkTargets(ids, logprobs, targets.log_tail_mass)


@torch.inference_mode()
def branch_scores(
    model: PreTrainedModel, request: TargetRequest, candidates: np.ndarray, block_size: int, tokens: int | None = None
) -> np.ndarray:
    """float64 [n, K]: for each position and each of its candidates, int [n, K], the log-probability of what follows in
    the block."""
    scores = np.zeros(candidates.shape)
    room = max(_BRANCH_TOKENS, int(request.positions.max()))
    for chunk in _chunks(branches(request, candidates, block_size), room):
        log_p = _log_probabilities(model, request, chunk, tokens)
        ends = np.cumsum([len(b.ids) for b in chunk])
        for branch, values in zip(chunk, np.split(log_p, ends[:-1]), strict=True):
            scores[branch.row, branch.column] = values.sum()
    return scores


def branches(request: TargetRequest, candidates: np.ndarray, block_size: int) -> Iterator[Branch]:
    """Those of all candidates, int [n, K], that have something behind them in their block."""
    x = request.ids.astype(np.int64)
    for row, (position, own) in enumerate(zip(request.positions.tolist(), candidates.astype(np.int64), strict=True)):
        end = min((position // block_size + 1) * block_size, len(x))  # behind the block's last token
        for column, candidate in enumerate(own if end - position > 1 else ()):
            ids = np.append(candidate, x[position + 1 : end - 1])
            yield Branch(row, column, position, ids, x[position + 1 : end])


def _chunks(found: Iterator[Branch], room: int) -> Iterator[list[Branch]]:
    chunk: list[Branch] = []
    for branch in found:
        if chunk and sum(len(b.ids) for b in chunk) + len(branch.ids) > room:
            yield chunk
            chunk = []
        chunk.append(branch)
    if chunk:
        yield chunk


def _log_probabilities(
    model: PreTrainedModel, request: TargetRequest, branches: Sequence[Branch], tokens: int | None
) -> np.ndarray:
    """float64 [tokens of all branches]: of what follows each of them."""
    clean = np.arange(max(b.start for b in branches))
    lengths = [len(b.ids) for b in branches]

    def column(of_clean: np.ndarray, of_branches: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([of_clean, *of_branches]).astype(np.int64)).to(model.device)

    ids = column(request.ids[clean], [b.ids for b in branches])
    place = column(clean, [b.start + np.arange(len(b.ids)) for b in branches])
    branch = column(np.full_like(clean, _CLEAN), [np.full(n, number) for number, n in enumerate(lengths)])
    start = column(np.full_like(clean, len(request.ids)), [np.full(len(b.ids), b.start) for b in branches])
    before = place[None, :] <= place[:, None]
    sees = before & (
        (branch[None, :] == branch[:, None]) | ((branch == _CLEAN)[None, :] & (place[None, :] < start[:, None]))
    )
    mask = per_layer_kind(
        attention_windows(model.config),
        lambda window: (sees if window is None else sees & (place[:, None] - place[None, :] < window))[None, None],
    )
    hidden = hidden_states(model, ids[None], place[None], mask)[0, len(clean) :]
    following = torch.from_numpy(np.concatenate([b.following for b in branches])).to(model.device)
    logits = full_precision_logits(hidden, lm_head_weight(model))[:, :tokens]
    log_p = logits.gather(-1, following[:, None])[:, 0] - logits.logsumexp(-1)
    return log_p.double().cpu().numpy()
