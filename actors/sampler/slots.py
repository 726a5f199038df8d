"""The slots of the sampler: what is known of every sequence in decoding.

Tensors live on the device and are changed in place, so that a captured CUDA graph keeps working on them; the host
keeps the few integers that it plans with. One read of five integers per slot is the only synchronisation of a pass, and
the next pass may be under way by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.sampler.request import Request
from common.trajectory import Trajectory, finish_reason, until_end

PATIENCE = 4  # passes for which a slot may wait


@dataclass(frozen=True)
class PassUnderWay:
    """A pass that the device was asked for, and where the host will find what came of it."""

    rows: np.ndarray  # int64 [R], the slots that it computes
    running: np.ndarray  # bool [slots], those whose results count
    flags: Tensor  # int32 [5, R] in host memory, see SlotState.reveal
    done: torch.cuda.Event | None


class SlotState:
    """What the sampler knows of every slot: tensors on the device, and the few integers that the host plans with.

    What the host knows is as old as the last pass that it has read.
    """

    def __init__(self, slots: int, length: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.active: dict[int, Request] = {}
        self.running = np.zeros(slots, bool)  # has a request in `active`
        self.block_host = np.zeros(slots, np.int64)
        self.masked_host = np.zeros(slots, np.int64)  # masked positions of the block; 0 where nothing runs
        self.uncommitted_host = np.zeros(slots, bool)
        self.waits = np.zeros(slots, np.int64)  # passes in a row that had no room for it
        self.denoise_forwards = np.zeros(slots, np.int64)
        self.commit_forwards = np.zeros(slots, np.int64)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.under_way: deque[PassUnderWay] = deque()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # reads what is done beside a pass
        pinned = device.type == "cuda"
        self.flags = deque(torch.zeros(5, slots, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
        self.ids = zeros(slots, length)
        self.reveal_round = zeros(slots, length, dtype=torch.int16)
        self.confidence = zeros(slots, length, dtype=torch.float32)
        self.masked = zeros(slots, block_size, dtype=torch.bool)
        self.uncommitted = zeros(slots, dtype=torch.bool)
        self.block = zeros(slots)
        self.end_block = zeros(slots)
        self.prompt_length = zeros(slots)
        self.round = zeros(slots)
        self.key = zeros(slots)
        self.threshold = zeros(dtype=torch.float32)  # of dynamic unmasking: it may change under a captured graph

    def clear(self) -> None:
        """Forget all sequences."""
        self.under_way.clear()
        self.active.clear()
        self.running[:] = self.uncommitted_host[:] = False
        self.masked_host[:] = self.waits[:] = 0
        self.masked.zero_()
        self.uncommitted.zero_()

    def admit(
        self, admitted: dict[int, Request], keys: Tensor, mask_token_id: int, end_of: Callable[[Request], int]
    ) -> None:
        """Put new sequences in their slots: all response positions masked, decoding to start behind the prompt."""
        size = self.block_size
        ids = np.full((len(admitted), self.ids.shape[1]), mask_token_id, np.int64)
        for row, (slot, request) in zip(ids, admitted.items(), strict=True):
            length = len(request.prompt_ids)
            row[:length] = request.prompt_ids
            self.block_host[slot] = length // size
            self.masked_host[slot] = size - length % size
            self.uncommitted_host[slot] = False
            self.denoise_forwards[slot] = self.commit_forwards[slot] = self.waits[slot] = 0
            self.running[slot] = True
        rows = torch.tensor(list(admitted), device=self.device)
        lengths = torch.tensor([len(r.prompt_ids) for r in admitted.values()], device=self.device)
        self.ids[rows] = torch.from_numpy(ids).to(self.device)
        self.prompt_length[rows] = lengths
        self.block[rows] = lengths // size
        self.end_block[rows] = torch.tensor([end_of(r) // size for r in admitted.values()], device=self.device)
        self.masked[rows] = torch.arange(size, device=self.device) >= (lengths % size)[:, None]
        self.uncommitted[rows] = False
        self.round[rows] = 0
        self.key[rows] = keys
        self.active.update(admitted)

    def expected(self, at_least: int, exactly: bool) -> tuple[int, int]:
        """Blocks to commit and masked positions in the next pass; a guess if a pass is under way that is not `exactly`
        known: a step reveals `at_least` so many positions of each block (or what is left), or just as many.

        Whoever finds no room because of the guess waits, for PATIENCE passes at most: then there is room for all.
        """
        if self.waits.max() >= PATIENCE:
            running = int(self.running.sum())
            return running, running * self.block_size
        masked, uncommitted = self.masked_host * self.running, self.uncommitted_host & self.running
        known = int(uncommitted.sum()), int(masked.sum())
        for under_way in self.under_way:
            left = np.where(under_way.running, masked - at_least, masked)
            done = under_way.running & (left <= 0)
            uncommitted = np.where(under_way.running, done, uncommitted)
            masked = np.where(done, self.block_size, left)
        commits, tokens = int(uncommitted.sum()), int(masked.sum())
        if self.under_way and not exactly:  # blocks that end early: as many as a pass before
            return max(commits, known[0]), max(tokens, known[1])
        return commits, tokens

    def reveal(
        self,
        rows: Tensor,
        reveal: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        waits: Tensor,
        eos_token_id: int,
    ) -> Tensor:
        """Write the revealed tokens and advance finished blocks, on the device.

        Args:
            rows: int64 [R], the slots in this pass.
            reveal: bool [R, B]; tokens: int64 [R, B]; confidence: float32 [R, B], 0 at positions not masked.
            waits: bool [R], slots for which the pass had no room: they stay as they are.

        Returns:
            int32 [5, R]: has gone on to its next block; sequence has ended; a confidence was not finite; positions
            that are masked in its next pass; has waited.
        """
        at = rows[:, None]
        current = self.block[at] * self.block_size + torch.arange(self.block_size, device=self.device)
        reveal = reveal & ~waits[:, None]
        ids = torch.where(reveal, tokens, self.ids[at, current])
        self.ids[at, current] = ids
        self.confidence[at, current] = torch.where(reveal, confidence, self.confidence[at, current])
        rounds = self.round[rows, None].to(torch.int16)
        self.reveal_round[at, current] = torch.where(reveal, rounds, self.reveal_round[at, current])
        masked = self.masked[rows] & ~reveal

        block_done = ~masked.any(dim=1)
        in_response = current >= self.prompt_length[rows, None]
        has_eos = ((ids == eos_token_id) & in_response).any(dim=1)
        ended = block_done & (has_eos | (self.block[rows] + 1 >= self.end_block[rows]))
        advance = block_done & ~ended
        masked = masked | advance[:, None]
        self.masked[rows] = masked
        self.uncommitted[rows] = advance | (self.uncommitted[rows] & waits)
        self.block[rows] = self.block[rows] + advance
        self.round[rows] = torch.where(block_done, 0, self.round[rows] + ~waits)
        broken = ~torch.isfinite(confidence).all(dim=1)
        return torch.stack([advance, ended, broken, masked.sum(dim=1), waits]).int()

    def launched(self, rows: np.ndarray, flags: Tensor) -> None:
        """Note a pass over the slots `rows` [R] whose `flags` [5, R], from `reveal`, are on their way."""
        host = self.flags[0][:, : len(rows)].copy_(flags, non_blocking=True)
        self.flags.rotate()
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        self.under_way.append(PassUnderWay(rows, self.running.copy(), host, done))

    def read(self) -> list[int]:
        """Wait for the oldest pass under way and take over what came of it; returns the slots that have ended.

        Raises:
            FloatingPointError: a running sequence had a non-finite confidence; names the ordinals.
        """
        oldest = self.under_way.popleft()
        if oldest.done:
            oldest.done.synchronize()
        counts = oldest.running[oldest.rows]
        rows = oldest.rows[counts]
        advanced, ended, broken, masked, waited = oldest.flags.numpy()[:, counts]
        if broken.any():
            ordinals = [self.active[slot].ordinal for slot in rows[broken > 0].tolist()]
            raise FloatingPointError(f"non-finite logits at sampled positions of prompts with ordinals {ordinals}")
        self.denoise_forwards[rows] += 1 - waited
        self.commit_forwards[rows] += self.uncommitted_host[rows] * (1 - waited)
        self.block_host[rows] += advanced
        self.masked_host[rows] = masked
        self.uncommitted_host[rows] = (advanced > 0) | (self.uncommitted_host[rows] & (waited > 0))
        self.waits[rows] = (self.waits[rows] + 1) * waited
        finished = rows[ended > 0]
        self.running[finished] = False
        for later in self.under_way:
            later.running[finished] = False
        return list(finished.tolist())

    def take(self, finished: list[int], eos_token_id: int, weights_version: int) -> list[Trajectory]:
        """The trajectories of the slots that have ended, which are free from now on.

        A pass that is under way meanwhile writes to them what stands there already.
        """
        if not finished:
            return []
        with torch.cuda.stream(self.copies):  # does nothing where there is none
            rows = torch.tensor(finished, device=self.device)
            ids = self.ids[rows].cpu().numpy().astype(np.int32)
            reveal_round = self.reveal_round[rows].cpu().numpy()
            confidence = self.confidence[rows].cpu().numpy()
        result = []
        for i, slot in enumerate(finished):
            request = self.active.pop(slot)
            start = len(request.prompt_ids)
            end = (int(self.block_host[slot]) + 1) * self.block_size
            written = ids[i, start:end]
            response = until_end(written[: request.max_new_tokens], eos_token_id)
            result.append(
                Trajectory(
                    ordinal=request.ordinal,
                    sample=request.sample,
                    domain=request.domain,
                    prompt_ids=np.asarray(request.prompt_ids, dtype=np.int32),
                    response_ids=response,
                    tail_ids=written[len(response) :],
                    reveal_round=reveal_round[i, start:end],
                    confidence=confidence[i, start:end],
                    weights_version=weights_version,
                    finish_reason=finish_reason(response, eos_token_id),
                    denoise_forwards=int(self.denoise_forwards[slot]),
                    commit_forwards=int(self.commit_forwards[slot]),
                )
            )
        return result
