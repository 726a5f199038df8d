"""State selection (nu): which partly masked states of a trajectory are trained, and with what weight.

Offsets count from the start of the response. With P prompt tokens and block size B, offset j is absolute position P + j
in block (P + j) // B. At round k of a block, the positions that were revealed in rounds >= k are masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from common.config.objective import ObjectiveConfig
from common.config.sources import MixtureSource
from common.config.states import (
    AllRoundsState,
    ComplementaryState,
    GlobalState,
    LiftState,
    MixtureState,
    PerBlockState,
    RandomState,
    StateSelection,
    SuffixState,
    random_masks,
)
from common.seeds import state_rng
from common.trajectory import EndTokens, Trajectory

_LEAST_RATIO = 1e-3  # bounds the weight 1/t
_VISITED: dict[str, StateSelection] = {
    "per_block": PerBlockState(),
    "global": GlobalState(),
    "all_rounds": AllRoundsState(),
}


@dataclass(frozen=True)
class NoiseTokens:
    """What uniform noise is drawn from: the ids below `count` that are not the mask token."""

    count: int
    mask_token_id: int

    def drawn(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [size], uniform."""
        ids = rng.integers(self.count - (self.mask_token_id < self.count), size=size)
        return ids + (ids >= self.mask_token_id)


def response_blocks(trajectory: Trajectory, block_size: int) -> np.ndarray:
    """int64 [response + tail]: the block of every response and tail position, on the absolute grid."""
    length = len(trajectory.response_ids) + len(trajectory.tail_ids)
    return (len(trajectory.prompt_ids) + np.arange(length)) // block_size


def trainable_offsets(trajectory: Trajectory, eos_token_id: EndTokens, exclude_eos: bool) -> np.ndarray:
    """bool [response + tail]: positions that may be trained. The tail never is, the end token by choice."""
    trainable = np.zeros(len(trajectory.response_ids) + len(trajectory.tail_ids), dtype=bool)
    trainable[: len(trajectory.response_ids)] = True
    if exclude_eos:
        trainable[: len(trajectory.response_ids)] &= ~np.isin(trajectory.response_ids, eos_token_id)
    return trainable


def select_states(
    trajectory: Trajectory,
    objective: ObjectiveConfig,
    block_size: int,
    eos_token_id: EndTokens,
    rng: np.random.Generator,
    noise: NoiseTokens | None = None,
) -> None:
    """Choose the trained states of one trajectory and write them into it.

    Sets `state_count`, `masked_offsets`, `masked_state`, `shown_ids`, `loss_weight` and `target_offsets`. Blocks
    without a masked trainable position are left out of a state, since nothing in them is trained. `noise` is needed
    where states show other tokens than masks.
    """
    block = response_blocks(trajectory, block_size)
    trainable = trainable_offsets(trajectory, eos_token_id, objective.exclude_eos)
    state = state_of(trajectory, objective)
    if isinstance(state, MixtureState):
        state = _one_of(state, rng)
    masks = _masks(trajectory, state, block, trainable, block_size, rng)
    copies = [(_trained_blocks(masked, trained, block), ratio, trained) for masked, ratio, trained in masks]
    copies = [copy for copy in copies if copy[0].any()]

    shown: list[np.ndarray] = []
    if (drawn := random_masks(state)) and drawn.mixes:
        assert noise
        shown = [_shown(masked, trajectory, drawn, noise, rng) for masked, _, _ in copies]
        if drawn.all_positions:
            copies = [(np.isin(block, block[masked]), ratio, trained) for masked, ratio, trained in copies]
    offsets = [np.flatnonzero(masked) for masked, _, _ in copies]
    decay = state.decay if isinstance(state, SuffixState) else 1.0
    weights = [
        np.where(trained[o], _decayed(decay, block[o]) / (ratio[o] if objective.weight == "inverse_t" else 1.0), 0.0)
        for o, (_, ratio, trained) in zip(offsets, copies, strict=True)
    ]
    trajectory.state_count = len(copies)
    trajectory.masked_offsets = _concat(offsets, np.int32)
    trajectory.masked_state = _concat([np.full(len(o), s) for s, o in enumerate(offsets)], np.int32)
    trajectory.shown_ids = _concat([ids[o] for ids, o in zip(shown, offsets, strict=False)], np.int32)
    trajectory.loss_weight = _concat(weights, np.float32)
    trajectory.target_offsets = np.unique(trajectory.masked_offsets[trajectory.loss_weight > 0])


def trained_positions(trajectory: Trajectory) -> np.ndarray:
    """bool [masked positions]: those that the loss counts, in the order of `masked_offsets`."""
    return trajectory.loss_weight > 0


def kept_by_difficulty(
    trajectory: Trajectory, log_p: np.ndarray, objective: ObjectiveConfig, block_size: int, run_seed: int
) -> Trajectory:
    """A trajectory whose states were selected by `state.kind` lift, with some of its masked tokens revealed again.

    Of the m tokens of x0 that were masked at t + rho, round(m t / (t + rho)) stay masked, one at least; m and t are of
    the sequence or of each block, as `masks.scope` says. Other trajectories are returned as they are.

    Args:
        log_p: float [trained positions], the student's log-probabilities of these tokens; higher is easier.
    """
    state = state_of(trajectory, objective)
    if not isinstance(state, LiftState):
        return trajectory
    rng = state_rng(run_seed, trajectory.ordinal, trajectory.sample)
    block = response_blocks(trajectory, block_size)
    _, ratio = _random_mask(state.masks, block, block_size, rng, state.rho)  # as it was drawn at first
    offsets, trained = trajectory.masked_offsets, trained_positions(trajectory)
    t = ratio[offsets[trained]]
    group = block[offsets[trained]] if state.masks.scope == "block" else np.zeros(len(t), np.int64)
    by = np.select([t > 2 / 3, t < 1 / 3], ["easiest", "hardest"], "random") if state.keep == "by_ratio" else state.keep
    score = np.select([by == "easiest", by == "hardest"], [-log_p, log_p], rng.random(len(t)))
    keep = np.ones(len(offsets), bool)
    keep[trained] = _lowest(score, group, t / np.minimum(t + state.rho, 1.0))
    of_block = block[offsets]
    keep &= np.isin(of_block, of_block[keep & trained])
    return replace(
        trajectory,
        masked_offsets=offsets[keep],
        masked_state=trajectory.masked_state[keep],
        loss_weight=trajectory.loss_weight[keep],
    )


def _lowest(score: np.ndarray, group: np.ndarray, share: np.ndarray) -> np.ndarray:
    """bool [n]: of each group its `share`, float [n], one value a group, with the lowest scores; rounded, at least
    one."""
    _, first, index, count = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(score), np.int64)
    rank[np.lexsort((score, index))] = np.arange(len(score)) - np.repeat(np.cumsum(count) - count, count)
    return rank < np.maximum(np.round(count * share[first]), 1)[index]


def state_of(trajectory: Trajectory, objective: ObjectiveConfig) -> StateSelection:
    """How the states of this trajectory are selected: offline responses in a mixture have a selection of their own."""
    of_rollouts = not isinstance(objective.state, SuffixState)  # which needs no rounds, so that it is of both
    if trajectory.is_offline and of_rollouts and isinstance(objective.source, MixtureSource):
        return objective.source.offline_state
    return objective.state


def _shown(
    masked: np.ndarray, trajectory: Trajectory, state: RandomState, noise: NoiseTokens, rng: np.random.Generator
) -> np.ndarray:
    """int64 [response + tail]: what a noised copy shows: masks, uniformly drawn tokens, and clean ones elsewhere."""
    uniform = rng.random(len(masked)) < state.uniform_share
    noised = np.where(uniform, noise.drawn(len(masked), rng), noise.mask_token_id)
    return np.where(masked, noised, np.concatenate([trajectory.response_ids, trajectory.tail_ids]))


def _masks(
    trajectory: Trajectory,
    state: StateSelection,
    block: np.ndarray,
    trainable: np.ndarray,
    block_size: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each noised copy: masked, bool, mask ratio, float, and trained where masked, bool; all [response + tail]."""
    if isinstance(state, RandomState):
        masks = [_random_mask(state, block, block_size, rng)]
    elif isinstance(state, SuffixState):
        masks = [_suffix_mask(state, block, len(trajectory.response_ids), rng)]
    elif isinstance(state, LiftState):
        masks = [_random_mask(state.masks, block, block_size, rng, state.rho)]
    elif isinstance(state, ComplementaryState):
        masked, ratio = _random_mask(state.masks, block, block_size, rng)
        masks = [(masked, ratio), (~masked, np.maximum(1 - ratio, _LEAST_RATIO))]
    else:
        return _visited_masks(trajectory.reveal_round, state, block, trainable, rng)
    return [(masked, ratio, trainable) for masked, ratio in masks]


def _one_of(state: MixtureState, rng: np.random.Generator) -> StateSelection:
    """One selection of the mixture, chosen in proportion to the shares."""
    shares = np.array([state.trajectory_share, state.random_share, state.complementary_share])
    way = rng.choice(3, p=shares / shares.sum())
    return [_VISITED[state.visited], state.masks, ComplementaryState(masks=state.masks)][way]


def _visited_masks(
    reveal: np.ndarray, state: StateSelection, block: np.ndarray, trainable: np.ndarray, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The states that the rollout visited: masked is what was revealed in round k or later, trained of it what was
    revealed before round k + window."""
    first, index = np.unique(block, return_inverse=True)
    last_round = np.full(len(first), -1)
    np.maximum.at(last_round, index, np.where(trainable, reveal, -1))
    if isinstance(state, PerBlockState):
        chosen = np.floor(rng.random(len(first)) * (last_round + 1)).astype(np.int64)
        rounds = [chosen[index]]
    elif isinstance(state, GlobalState):
        rounds = [np.full(len(block), rng.integers(max(last_round.max() + 1, 1)))]
    elif isinstance(state, AllRoundsState):
        rounds = [np.full(len(block), k) for k in range(last_round.max() + 1)]
    window = getattr(state, "window", 0)
    masks = [(reveal >= k, trainable & (reveal < k + window) if window else trainable) for k in rounds]
    return [(masked, _share(masked, index), trained) for masked, trained in masks]


def _random_mask(
    state: RandomState, block: np.ndarray, block_size: int, rng: np.random.Generator, more: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """A mask at a random ratio per block or per sequence plus `more`, and that ratio without it."""
    _, first, index = np.unique(block, return_index=True, return_inverse=True)
    draws = index.max(initial=0) + 1 if state.scope == "block" else 1
    ratio = state.min_ratio + (state.max_ratio - state.min_ratio) * rng.random(draws)
    ratio = ratio[index] if state.scope == "block" else np.full(len(block), ratio[0])
    noise = rng.random(len(block))
    masked = noise < ratio + more
    if state.at_least_one:
        lowest = np.lexsort((noise, block))[first]  # of each block
        masked[lowest[np.bincount(index, weights=masked) == 0]] = True
    if state.position_bias:
        place = np.arange(len(block)) - first[index]  # from the block's first position here: a constant factor less
        weight = np.exp(state.position_bias * (1 - ratio) * place / block_size)
        masked = _weighted_choice(np.bincount(index, weights=masked), weight, index, first, rng)
    return masked, np.maximum(ratio, _LEAST_RATIO)


def _suffix_mask(
    state: SuffixState, block: np.ndarray, response: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Each block masked from a position on, drawn among its tokens of the response, or whole; and its masked share."""
    _, first, index = np.unique(block, return_index=True, return_inverse=True)
    tokens = np.bincount(index[:response], minlength=len(first))
    start = np.floor(rng.random(len(first)) * tokens) * (rng.random(len(first)) >= state.whole_share)
    masked = np.arange(len(block)) - first[index] >= start[index]
    return masked, _share(masked, index)


def _weighted_choice(
    count: np.ndarray, weight: np.ndarray, index: np.ndarray, first: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """bool [response + tail]: `count` positions of each block, drawn one by one without replacement, each time in
    proportion to their weights: those that come first among exponential times with these rates."""
    order = np.lexsort((rng.exponential(size=len(weight)) / weight, index))  # blocks stay where they are
    rank = np.empty(len(weight), np.int64)
    rank[order] = np.arange(len(weight)) - first[index]
    return rank < count[index]


def _decayed(decay: float, block: np.ndarray) -> np.ndarray:
    """float [n]: decay to the power of how many masked positions of the same block are before it; `block` int [n] is
    that of each masked position, in order."""
    power: np.ndarray = decay ** (np.arange(len(block)) - np.searchsorted(block, block))
    return power


def _share(masked: np.ndarray, index: np.ndarray) -> np.ndarray:
    """float [response + tail]: the masked share of each position's block."""
    size = np.bincount(index)
    return (np.bincount(index, weights=masked, minlength=len(size)) / np.maximum(size, 1))[index]


def _trained_blocks(masked: np.ndarray, trained: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The mask without the blocks in which nothing that is masked is trained."""
    useful: np.ndarray = masked & np.isin(block, np.unique(block[masked & trained]))
    return useful


def _concat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
