"""The plan of a pass: what it computes for every slot, and the slots that it takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.sampler.slots import SlotState
from common.seeds import uniform

FEWEST_ROWS = 8  # of a pass on CUDA: with fewer it takes as long


def pass_rows(running: np.ndarray) -> np.ndarray:
    """The slots int64 [R] of a pass on CUDA: all of bool `running` [slots], then idle ones up to the least R that holds
    the running ones, among all slots, half of them, a quarter and so on, down to FEWEST_ROWS."""
    count = len(running)
    while count // 2 >= max(int(running.sum()), FEWEST_ROWS):
        count //= 2
    return np.concatenate([np.flatnonzero(running), np.flatnonzero(~running)])[:count]


class PassPlan(NamedTuple):
    """What a pass over R slots computes: a row of B positions for each slot, then one for each commit."""

    ids: Tensor  # int64 [R + commits, B]
    positions: Tensor  # int64 [R + commits, B]
    rows: Tensor  # int64 [R + commits], the slot of each row
    partner: Tensor  # int64 [R], see CacheRows
    sampled: Tensor  # int64 [tokens], which of the R * B positions get a token; R * B: padding
    noise: Tensor  # float32 [tokens], the uniform numbers for them
    waits: Tensor  # bool [R], slots for which there is no room
    done: Tensor  # int64 [commits], the place among the slots of each commit's; R: padding


def plan(state: SlotState, slots: Tensor, commits: int, tokens: int, revises: bool = False) -> PassPlan:
    """The plan of a pass over `slots` int64 [R] with room for so many commits and sampled tokens; with `revises` those
    are sampled too that the blocks have revealed."""
    size, count = state.block_size, len(slots)
    current = positions = state.block[slots, None] * size + torch.arange(size, device=slots.device)
    rows, waits, partner = slots, state.uncommitted[slots], torch.full((count + 1,), -1, device=slots.device)
    done = slots[:0]
    if commits:
        done, waits = _first(waits, commits)
        partner = partner.scatter(0, done, torch.arange(count, count + commits, device=slots.device))
        there, at = done < count, done.clamp(max=count - 1)
        positions = torch.cat([current, torch.where(there[:, None], current[at] - size, -1)])
        rows = torch.cat([slots, slots[at]])
    ids = state.ids[rows[:, None], positions.clamp(min=0)]
    masked = state.masked[slots]
    if revises:  # but of a sequence that has ended nothing
        masked = state.open_positions(slots) & masked.any(dim=1, keepdim=True)
    sampled, left_out = _first(masked.flatten(), tokens)
    waits = waits | left_out.view_as(masked).any(dim=1)
    noise = uniform(state.key[slots, None], current, state.round[slots, None]).flatten()
    noise = noise[sampled.clamp(max=count * size - 1)]
    return PassPlan(ids, positions, rows, partner[:count], sampled, noise, waits, done)


def placed(values: Tensor, sampled: Tensor, rows: int, size: int) -> Tensor:
    """`values` [tokens, ...] at the positions `sampled` of a PassPlan, [R, B, ...], zeros elsewhere."""
    placed = values.new_zeros(rows * size + 1, *values.shape[1:])
    placed[sampled] = values
    return placed[:-1].unflatten(0, (rows, size))


def by_slot(values: Tensor, done: Tensor, rows: int) -> Tensor:
    """`values` [commits, ...] at the places `done` of a PassPlan, [R, ...], zeros elsewhere."""
    placed = values.new_zeros(rows + 1, *values.shape[1:])
    placed[done] = values
    return placed[:-1]


def _first(chosen: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The indices of the first `room` that are chosen, int64 [room], filled up with N; and who is chosen but has no
    room, bool [N]. `chosen` is bool [N]."""
    rank = chosen.cumsum(0)
    late = chosen & (rank > room)
    at = torch.where(chosen & ~late, rank - 1, room)
    index = torch.full((room + 1,), len(chosen), device=chosen.device)
    return index.scatter(0, at, torch.arange(len(chosen), device=chosen.device))[:room], late
