"""State selection (nu): which partly masked states of a trajectory are trained, and with what weight.

Offsets count from the start of the response. With P prompt tokens and block size B, offset j is absolute position P + j
in block (P + j) // B. At round k of a block, the positions that were revealed in rounds >= k are masked.
"""

from __future__ import annotations

import numpy as np

from common.config.objective import (
    AllRoundsState,
    ComplementaryState,
    GlobalState,
    MixtureSource,
    MixtureState,
    ObjectiveConfig,
    PerBlockState,
    RandomState,
    StateSelection,
)
from common.trajectory import EndTokens, Trajectory

_LEAST_RATIO = 1e-3  # bounds the weight 1/t
_VISITED: dict[str, StateSelection] = {
    "per_block": PerBlockState(),
    "global": GlobalState(),
    "all_rounds": AllRoundsState(),
}


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
) -> None:
    """Choose the trained states of one trajectory and write them into it.

    Sets `state_count`, `masked_offsets`, `masked_state`, `loss_weight` and `target_offsets`. Blocks without a
    masked trainable position are left out of a state, since nothing in them is trained.
    """
    block = response_blocks(trajectory, block_size)
    trainable = trainable_offsets(trajectory, eos_token_id, objective.exclude_eos)
    masks = _masks(trajectory, objective, block, trainable, block_size, rng)
    copies = [_trained_blocks(mask, block, trainable) for mask in masks]
    copies = [(masked, ratio) for masked, ratio in copies if masked.any()]

    offsets = [np.flatnonzero(masked) for masked, _ in copies]
    weights = [
        np.where(trainable[o], 1.0 / ratio[o] if objective.weight == "inverse_t" else 1.0, 0.0)
        for o, (_, ratio) in zip(offsets, copies, strict=True)
    ]
    trajectory.state_count = len(copies)
    trajectory.masked_offsets = _concat(offsets, np.int32)
    trajectory.masked_state = _concat([np.full(len(o), s) for s, o in enumerate(offsets)], np.int32)
    trajectory.loss_weight = _concat(weights, np.float32)
    trajectory.target_offsets = np.unique(trajectory.masked_offsets[trajectory.loss_weight > 0])


def state_of(trajectory: Trajectory, objective: ObjectiveConfig) -> StateSelection:
    """How the states of this trajectory are selected: offline responses in a mixture have a selection of their own."""
    if trajectory.is_offline and isinstance(objective.source, MixtureSource):
        return objective.source.offline_state
    return objective.state


def _masks(
    trajectory: Trajectory,
    objective: ObjectiveConfig,
    block: np.ndarray,
    trainable: np.ndarray,
    block_size: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each noised copy: masked, bool, and mask ratio, float, both [response + tail]."""
    state = state_of(trajectory, objective)
    if isinstance(state, MixtureState):
        state = _one_of(state, rng)
    if isinstance(state, RandomState):
        return [_random_mask(state, block, block_size, rng)]
    if isinstance(state, ComplementaryState):
        masked, ratio = _random_mask(state.masks, block, block_size, rng)
        return [(masked, ratio), (~masked, np.maximum(1 - ratio, _LEAST_RATIO))]
    return _visited_masks(trajectory.reveal_round, state, block, trainable, rng)


def _one_of(state: MixtureState, rng: np.random.Generator) -> StateSelection:
    """One selection of the mixture, chosen in proportion to the shares."""
    shares = np.array([state.trajectory_share, state.random_share, state.complementary_share])
    way = rng.choice(3, p=shares / shares.sum())
    return [_VISITED[state.visited], state.masks, ComplementaryState(masks=state.masks)][way]


def _visited_masks(
    reveal: np.ndarray, state: StateSelection, block: np.ndarray, trainable: np.ndarray, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The states that the rollout visited: masked is what was revealed in round k or later."""
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
    masks = [reveal >= k for k in rounds]
    return [(masked, _share(masked, index)) for masked in masks]


def _random_mask(
    state: RandomState, block: np.ndarray, block_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A mask at a random ratio per block or per sequence, and that ratio."""
    _, first, index = np.unique(block, return_index=True, return_inverse=True)
    draws = index.max(initial=0) + 1 if state.scope == "block" else 1
    ratio = state.min_ratio + (state.max_ratio - state.min_ratio) * rng.random(draws)
    ratio = ratio[index] if state.scope == "block" else np.full(len(block), ratio[0])
    noise = rng.random(len(block))
    masked = noise < ratio
    if state.at_least_one:
        lowest = np.lexsort((noise, block))[first]  # of each block
        masked[lowest[np.bincount(index, weights=masked) == 0]] = True
    if state.position_bias:
        place = np.arange(len(block)) - first[index]  # from the block's first position here: a constant factor less
        weight = np.exp(state.position_bias * (1 - ratio) * place / block_size)
        masked = _weighted_choice(np.bincount(index, weights=masked), weight, index, first, rng)
    return masked, np.maximum(ratio, _LEAST_RATIO)


def _weighted_choice(
    count: np.ndarray, weight: np.ndarray, index: np.ndarray, first: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """bool [response + tail]: `count` positions of each block, drawn one by one without replacement, each time in
    proportion to their weights: those that come first among exponential times with these rates."""
    order = np.lexsort((rng.exponential(size=len(weight)) / weight, index))  # blocks stay where they are
    rank = np.empty(len(weight), np.int64)
    rank[order] = np.arange(len(weight)) - first[index]
    return rank < count[index]


def _share(masked: np.ndarray, index: np.ndarray) -> np.ndarray:
    """float [response + tail]: the masked share of each position's block."""
    size = np.bincount(index)
    return (np.bincount(index, weights=masked, minlength=len(size)) / np.maximum(size, 1))[index]


def _trained_blocks(
    mask: tuple[np.ndarray, np.ndarray], block: np.ndarray, trainable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mask without the blocks in which nothing trainable is masked."""
    masked, ratio = mask
    useful = np.isin(block, np.unique(block[masked & trainable]))
    return masked & useful, ratio


def _concat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
