"""The slots of the sampler: the state of every running sequence.

Tensors live on the device and are changed in place, so that captured CUDA graphs keep working on them; the host keeps
the few integers that it plans with. The host waits for the device once a pass, for five integers per slot, and the next
pass may be in progress by then.

Batching is continuous: a slot is free as soon as its sequence has ended, so a pass does not compute sequences that have
ended while the longest goes on. Every slot has memory for the longest request. Pages of memory, as serving engines have
them, would waste less where lengths differ much; they were left out so that a position is a plain index into its slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from actors.sampler.stop_strings import StopStrings, reach
from common.trajectory import EndTokens, Trajectory, finish_reason, until_end, without_end

PATIENCE = 4  # a slot that has waited for so many passes in a row gets room in the next


@dataclass(frozen=True)
class WrittenBlock:
    """What a running sequence has written in one block; positions of its prompt are among them."""

    ordinal: int
    sample: int
    start: int  # position of the block's first token in the sequence
    ids: np.ndarray  # int32 [B], the mask token where `masked`
    masked: np.ndarray  # bool [B]
    reveal_round: np.ndarray  # int16 [B], round within the block; of no meaning in the prompt and where masked
    confidence: np.ndarray  # float32 [B], likewise


@dataclass(frozen=True)
class PassInProgress:
    """A pass that was launched, and where the host will find its result."""

    rows: np.ndarray  # int64 [R], the slots that it computes
    running: np.ndarray  # bool [slots], those whose results count
    flags: Tensor  # int32 [7, R] in host memory, see SlotState.reveal
    done: torch.cuda.Event | None  # None: on CPU, where a pass is done when it was launched


class SlotState:
    """The state of every slot: tensors on the device, and the integers that the host plans with.

    Life cycle of a slot: free; running from `admit` on; ended when `read` returns it; free again after `take`, which
    makes its trajectory. In between, every pass takes these steps: `expected` says how much room it needs; `reveal`
    changes the state on the device, at the end of the pass; `launched` notes the pass; `read` waits for the oldest pass
    that was noted and brings the host's integers up to date. `stop` ends sequences at stop strings, after a `read`.
    `clear` frees all slots.

    Invariants: tensors are changed in place and never replaced. The host's integers are as old as the last pass that
    was read. A revealed position never changes again, but where the rule revises the present
    block. A block is committed in the next pass that has room.

    Example: block size 4, a prompt of 5 tokens (so its last token stands in block 1), `max_new_tokens` 6::

        what happens                               block   masked         uncommitted
        admit                                        1     5, 6, 7        no
        pass 1 reveals 6 and 7                       1     5              no
        pass 2 reveals 5: the block is done          2     8, 9, 10, 11   yes
        pass 3 commits block 1, reveals 8            2     9, 10, 11      no
        pass 4 reveals 9, 10 and 11                  2     none           no
        read returns the slot, take its trajectory: response 5 to 10, tail 11, 4 denoising forwards, 1 commit
    """

    def __init__(self, slots: int, length: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.active: dict[int, Request] = {}
        self.decodings: list[Decoding | None] = [None] * slots  # of the last request; equal ones are one object
        self.running = np.zeros(slots, bool)  # has a request in `active` that has not ended
        self.block_host = np.zeros(slots, np.int64)
        self.masked_host = np.zeros(slots, np.int64)  # masked positions of the block
        self.uncommitted_host = np.zeros(slots, bool)
        self.advanced: list[int] = []  # slots that the pass read last left with a finished block, and running
        self.waits = np.zeros(slots, np.int64)  # passes in a row that had no room for the slot
        self.written_host = np.zeros(slots, np.int64)  # positions whose tokens are final, from the sequence's start
        self.grown: list[int] = []  # slots of which the pass read last has left more final tokens, and running
        self.speculative = np.zeros(slots, bool)
        self.by_original = False  # whether another model than the student verifies these
        self.denoise_forwards = np.zeros(slots, np.int64)
        self.commit_forwards = np.zeros(slots, np.int64)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.in_progress: deque[PassInProgress] = deque()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # reads results beside a pass
        pinned = device.type == "cuda"
        self.flags = deque(torch.zeros(7, slots, dtype=torch.int32, pin_memory=pinned) for _ in range(2))
        # the slots of the next pass: at one address for all graphs, copied from host memory that no copy still reads
        self._rows_host = deque(torch.zeros(slots, dtype=torch.int64, pin_memory=pinned) for _ in range(3))
        self._rows_copied = np.zeros(0, np.int64)
        self._rows = zeros(slots)
        self._prompts = zeros(3, 2 * slots)
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
        # of verified decoding (actors/sampler/verification.py)
        self.kept = zeros(slots)  # leading tokens, which are final, of the uncommitted block, else of the present one
        self.limit = zeros(slots)  # how long prompt and response may be
        self.draft_round = zeros(slots)  # of the present draft
        self.block_rounds = zeros(slots)  # the last round of the uncommitted block
        self.drafts = zeros(slots, length)  # drafts that were tested; -1: none
        self.draft_hidden: Tensor | None = None  # [slots, B, d] that they were drawn from
        self.threshold = zeros(slots, dtype=torch.float32)  # of dynamic unmasking: may change under a captured graph

    def clear(self) -> None:
        """Forget all sequences."""
        self.in_progress.clear()
        self.active.clear()
        self.decodings = [None] * len(self.decodings)
        self.advanced = []
        self.running[:] = self.uncommitted_host[:] = self.speculative[:] = False
        self.grown = []
        self.by_original = False
        self.masked_host[:] = self.waits[:] = 0
        self.masked.zero_()
        self.uncommitted.zero_()

    def admit(
        self,
        admitted: dict[int, Request],
        keys: list[int],
        thresholds: list[float],
        mask_token_id: int,
        end_of: Callable[[Request], int],
    ) -> None:
        """Start new sequences, given by slot, in the block in which their prompt ends: all other positions are masked.

        Args:
            keys: of the random streams, one for each; thresholds: of dynamic unmasking, likewise.
            end_of: where a request's longest x0 ends, whole blocks.
        """
        size = self.block_size
        state = np.full((len(admitted), 4 + self.ids.shape[1]), mask_token_id, np.int64)
        for row, key, (slot, request) in zip(state, keys, admitted.items(), strict=True):
            length = len(request.prompt_ids)
            row[:4] = slot, length, end_of(request) // size, key
            row[4 : 4 + length] = request.prompt_ids
            self.block_host[slot] = length // size
            self.masked_host[slot] = size - length % size
            self.uncommitted_host[slot] = False
            self.written_host[slot] = self.block_host[slot] * size
            self.speculative[slot] = False
            self.denoise_forwards[slot] = self.commit_forwards[slot] = self.waits[slot] = 0
            self.running[slot] = True
        on_device = self.upload(state)
        rows, lengths, end_blocks, streams = on_device[:, :4].unbind(1)
        self.ids[rows] = on_device[:, 4:]
        self.prompt_length[rows] = lengths
        self.block[rows] = lengths // size
        self.end_block[rows] = end_blocks
        self.masked[rows] = torch.arange(size, device=self.device) >= (lengths % size)[:, None]
        self.uncommitted[rows] = False
        self.round[rows] = 0
        self.key[rows] = streams
        self.threshold[rows] = self.upload(np.array(thresholds, np.float32))
        self.active.update(admitted)

    def verify(self, slots: list[int], by_original: bool) -> None:
        """The sequences of these slots, just admitted, are decoded with verification, all `by_original` or none.

        A prompt that ends with a block leaves that one uncommitted: its commit gives the first token.
        """
        size = self.block_size
        lengths = np.array([len(self.active[slot].prompt_ids) for slot in slots])
        whole = lengths % size == 0
        self.speculative[slots] = True
        self.by_original = by_original
        self.written_host[slots] = lengths
        self.uncommitted_host[slots] = whole
        limits = [len(self.active[slot].prompt_ids) + self.active[slot].max_new_tokens for slot in slots]
        on_device = self.upload(np.stack([slots, np.where(whole, size, lengths % size), whole, limits]))
        rows, kept, uncommitted, limit = on_device
        self.limit[rows] = limit
        self.uncommitted[rows] = uncommitted.bool()
        self.kept[rows] = kept
        self.draft_round[rows] = 0
        self.drafts[rows] = -1

    def upload(self, array: np.ndarray) -> Tensor:
        """A copy of `array` on the device, for which the host does not wait while passes are in progress."""
        host = torch.from_numpy(array)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def running_decodings(self) -> tuple[Decoding, ...]:
        """The different settings of the sequences that run."""
        settings = (self.decodings[slot] for slot in np.flatnonzero(self.running).tolist())
        return tuple({id(d): d for d in settings if d}.values())

    def expected(self, at_least: int, exactly: bool) -> tuple[int, int]:
        """The commits and the masked positions of the next pass.

        A step reveals `at_least` so many positions of each block (or all that are left), or `exactly` as many. So the
        numbers are a guess while a pass is in progress whose rule may reveal more. A slot that finds no room because of
        the guess waits; after PATIENCE passes there is room for all.
        """
        if self.waits.max() >= PATIENCE:
            running = int(self.running.sum())
            return running, running * self.block_size
        masked, uncommitted = self.masked_host * self.running, self.uncommitted_host & self.running
        known = int(uncommitted.sum()), int(masked.sum())
        for in_progress in self.in_progress:
            left = np.where(in_progress.running, masked - at_least, masked)
            done = in_progress.running & (left <= 0)
            uncommitted = np.where(in_progress.running, done, uncommitted)
            masked = np.where(done, self.block_size, left)
        commits, tokens = int(uncommitted.sum()), int(masked.sum())
        if self.in_progress and not exactly:  # blocks may end early: about as many as one pass ago
            return max(commits, known[0]), max(tokens, known[1])
        return commits, tokens

    def committed_tokens(self, slots: list[int]) -> list[int]:
        """How many tokens of these slots are committed; waits for passes in progress."""
        rows = torch.tensor(slots, device=self.device)
        committed: list[int] = ((self.block[rows] - self.uncommitted[rows].long()) * self.block_size).tolist()
        return committed

    def open_positions(self, rows: Tensor) -> Tensor:
        """bool [R, B]: what the present blocks of the slots `rows` int64 [R] hold beyond their prompts."""
        return self._current(rows) >= self.prompt_length[rows, None]

    def present_ids(self, rows: Tensor) -> Tensor:
        """int64 [R, B]: the tokens of these blocks."""
        return self.ids[rows[:, None], self._current(rows)]

    def _current(self, rows: Tensor) -> Tensor:
        """int64 [R, B]: the positions of the present blocks."""
        return self.block[rows, None] * self.block_size + torch.arange(self.block_size, device=self.device)

    def revealed_confidence(self, rows: Tensor) -> Tensor:
        """float32 [R, B]: the confidence of what earlier rounds have revealed in the present block of the slots `rows`
        int64 [R], NaN elsewhere."""
        current = self._current(rows)
        revealed = ~self.masked[rows] & self.open_positions(rows)
        return torch.where(revealed, self.confidence[rows[:, None], current], torch.nan)

    def reveal(
        self,
        rows: Tensor,
        reveal: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        waits: Tensor,
        end_tokens: Tensor,
    ) -> Tensor:
        """Write the revealed tokens and advance finished blocks, on the device.

        Args:
            rows: int64 [R], the slots in this pass.
            reveal: bool [R, B]; tokens: int64 [R, B]; confidence: float32 [R, B], 0 at positions not masked.
            waits: bool [R], slots for which the pass had no room: they stay as they are.
            end_tokens: int64 [E].

        Returns:
            int32 [7, R] of flags and counts: blocks that it went on (-1: it went back); sequence has ended; a
            confidence was not finite; masked positions in its next pass; waited; the block before is uncommitted;
            positions of the sequence whose tokens are final.
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
        has_end = ((ids[..., None] == end_tokens).any(dim=2) & in_response).any(dim=1)
        ended = block_done & (has_end | (self.block[rows] + 1 >= self.end_block[rows]))
        advance = block_done & ~ended
        masked = masked | advance[:, None]
        self.masked[rows] = masked
        uncommitted = advance | (self.uncommitted[rows] & waits)
        self.uncommitted[rows] = uncommitted
        self.block[rows] = self.block[rows] + advance
        self.round[rows] = torch.where(block_done, 0, self.round[rows] + ~waits)
        broken = ~torch.isfinite(confidence).all(dim=1)
        written = self.block[rows] * self.block_size
        return torch.stack([advance, ended, broken, masked.sum(dim=1), waits, uncommitted, written]).int()

    def rows_on_device(self, rows: np.ndarray) -> Tensor:
        """The slots `rows` int64 [R] of the next pass on the device, whatever R always at the same address. At most two
        passes may be in progress."""
        if not np.array_equal(rows, self._rows_copied):
            host = self._rows_host[0][: len(rows)]
            host.numpy()[:] = rows
            self._rows_host.rotate()
            self._rows[: len(rows)].copy_(host, non_blocking=True)
            self._rows_copied = rows
        return self._rows[: len(rows)]

    def prompts_on_device(self, slots: list[int], starts: list[int], ends: list[int], count: int) -> Tensor:
        """int64 [3, count], always at the same address: slots whose tokens are to be cached, from where and how far;
        then empty rows."""
        given = np.zeros((3, count), np.int64)
        given[:, : len(slots)] = slots, starts, ends
        return self._prompts[:, :count].copy_(self.upload(given))

    def launched(self, rows: np.ndarray, flags: Tensor) -> None:
        """Note a pass over the slots `rows` int64 [R]; `flags` int32 [7, R], from `reveal`, are copied to the host."""
        host = self.flags[0][:, : len(rows)].copy_(flags, non_blocking=True)
        self.flags.rotate()
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        self.in_progress.append(PassInProgress(rows, self.running.copy(), host, done))

    def read(self) -> list[int]:
        """Wait for the oldest pass in progress and take over its result; returns the slots that have ended.

        Raises:
            FloatingPointError: a running sequence had a non-finite confidence; names the ordinals.
        """
        oldest = self.in_progress.popleft()
        if oldest.done:
            oldest.done.synchronize()
        counts = oldest.running[oldest.rows]
        rows = oldest.rows[counts]
        moved, ended, broken, masked, waited, uncommitted, written = oldest.flags.numpy()[:, counts]
        if broken.any():
            ordinals = [self.active[slot].ordinal for slot in rows[broken > 0].tolist()]
            raise FloatingPointError(f"non-finite logits at sampled positions of prompts with ordinals {ordinals}")
        commits = self.uncommitted_host[rows] * (1 - waited)
        self.denoise_forwards[rows] += 1 - waited + commits * self.by_original
        self.commit_forwards[rows] += commits
        self.block_host[rows] += moved
        self.masked_host[rows] = masked
        self.uncommitted_host[rows] = uncommitted > 0
        self.waits[rows] = (self.waits[rows] + 1) * waited
        before, self.written_host[rows] = self.written_host[rows], written
        self.grown = rows[written > before].tolist()
        self.advanced = rows[written // self.block_size > before // self.block_size].tolist()
        return self._end(rows[ended > 0].tolist())

    def stop(self, stops: StopStrings) -> list[int]:
        """End the sequences whose newest final tokens complete a stop string of their request; returns their slots.

        Passes in progress may have begun their next block, which is forgotten.
        """
        watched = [slot for slot in self.grown if self.active[slot].stop]
        if not watched:
            return []
        far = max(reach(self.active[slot].stop, self.block_size) for slot in watched)
        ends = self.written_host[watched]
        with torch.cuda.stream(self.copies):  # None, on CPU: no effect
            rows = torch.tensor(watched, device=self.device)
            positions = torch.from_numpy(np.maximum(ends[:, None] + np.arange(-far, 0), 0)).to(self.device)
            last = self.ids[rows[:, None], positions].cpu().numpy()
        stopped = []
        for slot, ids, end in zip(watched, last, ends, strict=True):
            request = self.active[slot]
            written = min(far, int(end) - len(request.prompt_ids))
            if stops.found(ids[far - written :], request.stop):
                stopped.append(slot)
        if stopped:
            self.block_host[stopped] = (self.written_host[stopped] - 1) // self.block_size  # in which it ends
            self.masked[stopped] = False
            self.uncommitted[stopped] = False
        return self._end(stopped)

    def drop(self, slots: list[int]) -> None:
        """Forget the sequences of these slots, which are free from now on."""
        if slots:
            self.masked[slots] = False
            self.uncommitted[slots] = False
            for slot in self._end(slots):
                del self.active[slot]

    def finished_blocks(self, slots: list[int]) -> list[WrittenBlock]:
        """The last finished block of each of these running slots; does not wait for passes in progress."""
        if not slots:
            return []
        with torch.cuda.stream(self.copies):  # None, on CPU: no effect
            return self._blocks(
                slots, self.written_host[slots] // self.block_size - 1, np.zeros((len(slots), self.block_size), bool)
            )

    def current_blocks(self, slots: list[int]) -> list[WrittenBlock]:
        """The block that each of these running slots is at; waits for passes in progress."""
        if not slots:
            return []
        rows = torch.tensor(slots, device=self.device)
        return self._blocks(slots, self.block[rows].cpu().numpy(), self.masked[rows].cpu().numpy())

    def _blocks(self, slots: list[int], blocks: np.ndarray, masked: np.ndarray) -> list[WrittenBlock]:
        rows = torch.tensor(slots, device=self.device)
        starts = blocks * self.block_size
        positions = torch.from_numpy(starts[:, None] + np.arange(self.block_size)).to(self.device)
        written = (x[rows[:, None], positions].cpu().numpy() for x in (self.ids, self.reveal_round, self.confidence))
        requests = [self.active[slot] for slot in slots]
        return [
            WrittenBlock(request.ordinal, request.sample, int(start), ids.astype(np.int32), still, rounds, confidence)
            for request, start, still, ids, rounds, confidence in zip(requests, starts, masked, *written, strict=True)
        ]

    def _end(self, slots: list[int]) -> list[int]:
        """Passes in progress no longer count for these slots."""
        for running in (self.running, *(later.running for later in self.in_progress)):
            running[slots] = False
        self.advanced = [slot for slot in self.advanced if slot not in slots]
        self.grown = [slot for slot in self.grown if slot not in slots]
        return slots

    def take(
        self, finished: list[int], eos_token_id: EndTokens, weights_version: int, stops: StopStrings | None = None
    ) -> list[Trajectory]:
        """The trajectories of slots that have ended, cut at their stop strings; they are free from now on.

        A pass in progress that was launched before the end was known does not change them.
        """
        if not finished:
            return []
        with torch.cuda.stream(self.copies):  # None, on CPU: no effect
            rows = torch.tensor(finished, device=self.device)
            ids = self.ids[rows].cpu().numpy().astype(np.int32)
            reveal_round = self.reveal_round[rows].cpu().numpy()
            confidence = self.confidence[rows].cpu().numpy()
            drafts = self.drafts[rows].cpu().numpy().astype(np.int32)
        result = []
        for i, slot in enumerate(finished):
            request = self.active.pop(slot)
            start = len(request.prompt_ids)
            end = (int(self.block_host[slot]) + 1) * self.block_size
            written = ids[i, start:end]
            response = until_end(written[: request.max_new_tokens], eos_token_id)
            reason = finish_reason(response, eos_token_id)
            if request.stop and stops and (count := stops.completed(without_end(response, eos_token_id), request.stop)):
                response, reason = response[:count], "stop"
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
                    finish_reason=reason,
                    denoise_forwards=int(self.denoise_forwards[slot]),
                    commit_forwards=int(self.commit_forwards[slot]),
                    draft_ids=drafts[i, start:end] if self.speculative[slot] else np.empty(0, np.int32),
                )
            )
        return result
