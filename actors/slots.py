"""The slots of the sampler: what is known of every sequence in decoding.

Tensors live on the device and are changed in place, so that a captured CUDA graph keeps working on them; the host
keeps the few integers that it plans with. One read of four integers per slot is the only synchronisation of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.trajectory import Trajectory


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    The response runs to the end of the block in which it reaches `max_new_tokens`: up to B - 1 tokens more.
    """

    ordinal: int
    sample: int
    prompt_ids: np.ndarray
    max_new_tokens: int
    domain: str = ""


class SlotState:
    """What the sampler knows of every slot: tensors on the device, and the few integers that the host plans with."""

    def __init__(self, slots: int, length: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.active: dict[int, Request] = {}
        self.running = np.zeros(slots, bool)  # has a request in `active`
        self.block_host = np.zeros(slots, np.int64)
        self.masked_host = np.zeros(slots, np.int64)  # masked positions of the block; 0 where nothing runs
        self.uncommitted_host = np.zeros(slots, bool)
        self.denoise_forwards = np.zeros(slots, np.int64)
        self.commit_forwards = np.zeros(slots, np.int64)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.flags = torch.zeros(4, slots, dtype=torch.int32, pin_memory=device.type == "cuda")
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

    def clear(self) -> None:
        """Forget all sequences."""
        self.active.clear()
        self.running[:] = self.uncommitted_host[:] = False
        self.masked_host[:] = 0
        self.masked.zero_()
        self.uncommitted.zero_()

    def admit(
        self, admitted: dict[int, Request], keys: Tensor, mask_token_id: int, end_of: Callable[[Request], int]
    ) -> None:
        """Put new sequences in their slots: all response positions masked, decoding to start behind the prompt."""
        size = self.block_size
        for slot, request in admitted.items():
            prompt = torch.as_tensor(np.asarray(request.prompt_ids, dtype=np.int64)).to(self.device)
            self.ids[slot, : len(prompt)] = prompt
            self.ids[slot, len(prompt) :] = mask_token_id
            self.block_host[slot] = len(prompt) // size
            self.masked_host[slot] = size - len(prompt) % size
            self.uncommitted_host[slot] = False
            self.denoise_forwards[slot] = self.commit_forwards[slot] = 0
            self.running[slot] = True
        rows = torch.tensor(list(admitted), device=self.device)
        lengths = torch.tensor([len(r.prompt_ids) for r in admitted.values()], device=self.device)
        self.prompt_length[rows] = lengths
        self.block[rows] = lengths // size
        self.end_block[rows] = torch.tensor([end_of(r) // size for r in admitted.values()], device=self.device)
        self.masked[rows] = torch.arange(size, device=self.device) >= (lengths % size)[:, None]
        self.uncommitted[rows] = False
        self.round[rows] = 0
        self.key[rows] = keys
        self.active.update(admitted)

    def reveal(
        self, rows: Tensor, current: Tensor, reveal: Tensor, tokens: Tensor, confidence: Tensor, eos_token_id: int
    ) -> Tensor:
        """Write the revealed tokens and advance finished blocks, on the device.

        Args:
            rows: int64 [R], the slots in this pass; current: int64 [R, B], positions of their blocks.
            reveal: bool [R, B]; tokens: int64 [R, B]; confidence: float32 [R, B], 0 at positions not masked.

        Returns:
            int32 [4, R] in host memory, valid once the device has come so far: has gone on to its next block; sequence
            has ended; a confidence was not finite; positions that are masked in its next pass.
        """
        at = rows[:, None]
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
        self.uncommitted[rows] = advance
        self.block[rows] = self.block[rows] + advance
        self.round[rows] = torch.where(block_done, 0, self.round[rows] + 1)
        broken = ~torch.isfinite(confidence).all(dim=1)
        return self.flags[:, : len(rows)].copy_(torch.stack([advance, ended, broken, masked.sum(dim=1)]), True)

    def advance(self, rows: np.ndarray, flags: Tensor) -> list[int]:
        """Read what `reveal` returned for the slots `rows` [R], the only synchronisation of a pass; returns the slots
        that have ended.

        Raises:
            FloatingPointError: a running sequence had a non-finite confidence; names the ordinals.
        """
        running = self.running[rows]
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        advanced, ended, broken, masked = flags.numpy()[:, running]
        rows = rows[running]
        if broken.any():
            ordinals = [self.active[slot].ordinal for slot in rows[broken > 0].tolist()]
            raise FloatingPointError(f"non-finite logits at sampled positions of prompts with ordinals {ordinals}")
        self.denoise_forwards[rows] += 1
        self.commit_forwards[rows] += self.uncommitted_host[rows]
        self.block_host[rows] += advanced
        self.masked_host[rows] = masked
        self.uncommitted_host[rows] = advanced > 0
        return list(rows[ended > 0].tolist())

    def take(self, finished: list[int], eos_token_id: int, weights_version: int) -> list[Trajectory]:
        """Free the slots and return their trajectories."""
        if not finished:
            return []
        rows = torch.tensor(finished, device=self.device)
        ids = self.ids[rows].cpu().numpy().astype(np.int32)
        reveal_round = self.reveal_round[rows].cpu().numpy()
        confidence = self.confidence[rows].cpu().numpy()
        result = []
        for i, slot in enumerate(finished):
            request = self.active.pop(slot)
            self.running[slot] = False
            start = len(request.prompt_ids)
            end = (int(self.block_host[slot]) + 1) * self.block_size
            written = ids[i, start:end]
            eos = np.flatnonzero(written == eos_token_id)
            cut = int(eos[0]) + 1 if len(eos) else len(written)
            result.append(
                Trajectory(
                    ordinal=request.ordinal,
                    sample=request.sample,
                    domain=request.domain,
                    prompt_ids=np.asarray(request.prompt_ids, dtype=np.int32),
                    response_ids=written[:cut],
                    tail_ids=written[cut:],
                    reveal_round=reveal_round[i, start:end],
                    confidence=confidence[i, start:end],
                    weights_version=weights_version,
                    finish_reason="eos" if len(eos) else "length",
                    denoise_forwards=int(self.denoise_forwards[slot]),
                    commit_forwards=int(self.commit_forwards[slot]),
                )
            )
        return result
