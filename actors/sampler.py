"""The block-diffusion sampler: continuous batching over slots, cached blocks, fused commits.

A pass is one forward of every running sequence's current block against its cached prefix, followed by one batched
choice of tokens. When a block is done, its clean tokens are committed to the cache in the forward that first denoises
the next block: they are one more row of that forward, which does not see the next block. A slot whose sequence has
ended is refilled before the next pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors import attention
from actors.cache import CacheRows, SlotCache
from actors.drawing import Decoding, draw
from actors.graphs import PassGraphs
from actors.projections import pack_projections
from actors.slots import Request, SlotState
from actors.unmasking import choose
from common.seeds import stream_key, uniform
from common.student import full_precision_logits, hidden_states
from common.trajectory import Trajectory


class Sampler:
    """Generates trajectories with the model's current weights; `weights_version` is stamped on each.

    On CUDA a pass always takes all slots, so that its shapes repeat: it is compiled, and replayed as a graph from its
    second use on; weights may be replaced in place. On CPU a pass takes the running slots only. `forwards` counts the
    passes of the model after prefill, `commits` the blocks that were committed in them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        block_size: int,
        mask_token_id: int,
        eos_token_id: int,
        slots: int,
        seed: int,
        cuda_graphs: bool = True,
        compiled: bool = True,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.slots = slots
        self.seed = seed
        self.device = model.get_output_embeddings().weight.device
        self.on_cuda = self.device.type == "cuda"
        self.weights_version = 0
        self.forwards = 0
        self.commits = 0
        self._use_graphs = self.on_cuda and cuda_graphs
        self._no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # CacheRows say who sees what
        self._cache: SlotCache | None = None
        self._state: SlotState | None = None
        self._all_slots = torch.arange(slots, device=self.device)
        model.set_attn_implementation(attention.register())
        if self.on_cuda:
            pack_projections(model)
        if self.on_cuda and compiled:
            for layer in model.model.layers:  # one compiled layer serves all
                layer.compile(dynamic=True)

    def set_block_size(self, block_size: int) -> None:
        """Decode in blocks of this size from the next call on."""
        if block_size != self.block_size:
            self.block_size = block_size
            self._cache = self._state = None

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Trajectory]:
        """Yield each trajectory as it ends.

        Raises:
            FloatingPointError: the model gave a non-finite logit at a sampled position.
        """
        waiting = deque(requests)
        if not waiting:
            return
        state, cache = self._memory(max(self._end(r) for r in waiting))
        while waiting or state.active:
            free = np.flatnonzero(~state.running).tolist() if waiting else []
            admitted = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if admitted:
                state.admit(admitted, self._keys(admitted), self.mask_token_id, self._end)
                self._prefill(state, cache, admitted)
            finished = self._pass(state, cache, decoding)
            yield from state.take(finished, self.eos_token_id, self.weights_version)

    def _end(self, request: Request) -> int:
        """Length of the longest possible x0, on the block grid."""
        total = len(request.prompt_ids) + request.max_new_tokens
        return -(-total // self.block_size) * self.block_size

    def _memory(self, length: int) -> tuple[SlotState, SlotCache]:
        """Slots and cache for sequences of `length`; kept from call to call, replaced when they are too short."""
        if self._state is None or self._cache is None or self._cache.length < length:
            self._state = self._cache = None
            capacity = -(-length // 128) * 128
            self._cache = SlotCache(self.model, self.slots, capacity)
            self._state = SlotState(self.slots, capacity, self.block_size, self.device)
            self._graphs = PassGraphs() if self._use_graphs else None
        self._cache.attach(self.model)  # another sampler of this model may have run since
        self._state.clear()  # an earlier caller may have left before the end
        return self._state, self._cache

    def _forward(self, ids: Tensor, positions: Tensor, slots: Tensor, partner: Tensor | None = None) -> Tensor:
        """Hidden states [N, Q, d] of ids [N, Q] at `positions` [N, Q] of `slots` [N], over the cache."""
        rows = CacheRows(slots, positions, self.block_size, partner)
        return hidden_states(self.model, ids, positions, self._no_mask, cache_rows=rows)

    def _keys(self, admitted: dict[int, Request]) -> Tensor:
        keys = [stream_key(self.seed, r.ordinal, r.sample) for r in admitted.values()]
        return torch.tensor(keys, dtype=torch.int64, device=self.device)

    def _prefill(self, state: SlotState, cache: SlotCache, admitted: dict[int, Request]) -> None:
        """Cache the complete prompt blocks of new sequences in one forward, once for all samples of a prompt."""
        samples: dict[bytes, list[int]] = {}
        for slot, request in admitted.items():
            if state.block_host[slot] > 0:
                samples.setdefault(request.prompt_ids.tobytes(), []).append(slot)
        if not samples:
            return
        lengths = {group[0]: int(state.block_host[group[0]]) * self.block_size for group in samples.values()}
        longest = max(lengths.values())
        slots = torch.tensor(list(lengths), device=self.device)
        ends = torch.tensor(list(lengths.values()), device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(lengths), longest)
        positions = torch.where(positions < ends[:, None], positions, -1)
        self._forward(state.ids[slots, :longest], positions, slots)
        twins = [(group[0], slot) for group in samples.values() for slot in group[1:]]
        if twins:
            source, target = torch.tensor(twins, device=self.device).T
            cache.copy(source, target, longest)

    def _pass(self, state: SlotState, cache: SlotCache, decoding: Decoding) -> list[int]:
        """One forward and one reveal of all running sequences; returns the slots whose sequences ended."""
        commits = int(state.uncommitted_host[state.running].sum())
        masked = int(state.masked_host[state.running].sum())
        self.forwards += 1
        self.commits += commits
        if not self.on_cuda:
            slots = np.flatnonzero(state.running)
            return state.advance(slots, self._on_device(state, decoding, torch.from_numpy(slots), commits, masked))
        # all slots, and few shapes, so that few graphs serve all passes
        commits = _round_up(commits, -(-self.slots // 4), self.slots)
        masked = _round_up(masked, -(-self.slots * self.block_size // 8), self.slots * self.block_size)

        def device_pass() -> Tensor:
            return self._on_device(state, decoding, self._all_slots, commits, masked)

        flags = self._graphs.run((commits, masked, decoding), device_pass) if self._graphs else device_pass()
        return state.advance(np.arange(self.slots), flags)

    def _on_device(self, state: SlotState, decoding: Decoding, slots: Tensor, commits: int, draws: int) -> Tensor:
        """The device's part of a pass over `slots` [R], without synchronisation; returns what `SlotState.reveal` does.

        `commits` rows are added for blocks that are done, and `draws` positions get a token: at least as many as are
        masked. Where fewer are, the rest is padding.
        """
        offsets = torch.arange(self.block_size, device=self.device)
        current = positions = state.block[slots, None] * self.block_size + offsets
        rows, partner = slots, torch.full_like(slots, -1)
        if commits:
            order = torch.argsort(state.uncommitted[slots].int(), descending=True, stable=True)[:commits]
            done = state.uncommitted[slots[order]]
            positions = torch.cat([current, torch.where(done[:, None], current[order] - self.block_size, -1)])
            rows = torch.cat([slots, slots[order]])
            partner[order] = torch.where(done, torch.arange(len(slots), len(rows), device=self.device), -1)
        ids = state.ids[rows[:, None], positions.clamp(min=0)]
        hidden = self._forward(ids, positions, rows, partner)[: len(slots)]

        masked = state.masked[slots]
        drawn = torch.argsort(masked.flatten().int(), descending=True, stable=True)[:draws]
        logits = full_precision_logits(hidden.flatten(0, 1)[drawn], self.model.get_output_embeddings().weight)
        noise = uniform(state.key[slots, None], current, state.round[slots, None])
        token, confidence, entropy = (
            torch.zeros(masked.numel(), dtype=x.dtype, device=self.device).scatter(0, drawn, x).view_as(masked)
            for x in draw(logits, noise.flatten()[drawn], decoding, self.mask_token_id)
        )
        confidence = torch.where(masked, confidence, 0.0)
        reveal = choose(decoding.unmasking, masked, confidence, entropy)
        return state.reveal(slots, current, reveal, token, confidence, self.eos_token_id)


def _round_up(count: int, step: int, most: int) -> int:
    """The next multiple of `step`, or `most`."""
    return min(-(-count // step) * step, most)
