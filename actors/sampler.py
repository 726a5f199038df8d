"""The block-diffusion sampler: continuous batching over slots, cached blocks, fused commits.

A pass is one forward of every running sequence's current block against its cached prefix, followed by one batched
choice of tokens. When a block is done, its clean tokens are committed to the cache in the same forward that first
denoises the next block: the forward then has 2B rows per sequence, and the commit rows do not see the next block.
A slot whose sequence has ended is refilled before the next pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.attention import register as register_attention
from actors.cache import SlotCache
from actors.graphs import PassGraphs
from actors.slots import Request, SlotState
from actors.unmasking import choose
from common.config import DynamicUnmasking, EntropyBoundUnmasking, Unmasking
from common.masks import decoding_mask
from common.seeds import stream_key, uniform
from common.student import hidden_states
from common.trajectory import Trajectory


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn and revealed."""

    unmasking: Unmasking = DynamicUnmasking()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Sampler:
    """Generates trajectories with the model's current weights; `weights_version` is stamped on each.

    On CUDA a pass always takes all slots, so that its shapes repeat, and is replayed as a graph from its second use
    on; weights may be replaced in place. On CPU a pass takes the running slots only. `forwards` counts the passes
    of the model after prefill, `wide_forwards` those that carried commits.
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
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.slots = slots
        self.seed = seed
        self.device = model.get_output_embeddings().weight.device
        self.on_cuda = self.device.type == "cuda"
        self.context_step = 128 if self.on_cuda else 32
        self.weights_version = 0
        self.forwards = 0
        self.wide_forwards = 0
        self._graphs = PassGraphs() if self.on_cuda and cuda_graphs else None
        self._all_slots = torch.arange(slots, device=self.device)
        self._cache: SlotCache | None = None
        self._state: SlotState | None = None
        model.set_attn_implementation(register_attention())

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
            free = [s for s in range(self.slots) if s not in state.active]
            admitted = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if admitted:
                state.admit(admitted, self._keys(admitted), self.mask_token_id, self._end)
                self._prefill(state, cache, sorted(admitted))
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
            if self._graphs:
                self._graphs = PassGraphs()
            capacity = -(-length // self.context_step) * self.context_step
            sizes = (self.slots, capacity, self.block_size)
            self._cache = SlotCache(self.model.config, *sizes, self.model.dtype, self.device)
            self._state = SlotState(*sizes, self.device)
        self._state.active.clear()  # an earlier caller may have left before the end
        return self._state, self._cache

    def _keys(self, admitted: dict[int, Request]) -> Tensor:
        keys = [stream_key(self.seed, r.ordinal, r.sample) for r in admitted.values()]
        return torch.tensor(keys, dtype=torch.int64, device=self.device)

    def _prefill(self, state: SlotState, cache: SlotCache, slots: list[int]) -> None:
        """Cache the complete prompt blocks of new sequences in one forward, padded to the longest."""
        slots = [s for s in slots if state.block_host[s] > 0]
        if not slots:
            return
        length = max(state.block_host[s] for s in slots) * self.block_size
        rows = torch.tensor(slots, device=self.device)
        positions = torch.arange(length, device=self.device).expand(len(slots), length)
        mask = decoding_mask(positions, length, self.block_size)
        ids = state.ids[rows, :length]
        hidden_states(self.model, ids, positions, mask, cache.at(rows, positions, length))

    def _pass(self, state: SlotState, cache: SlotCache, decoding: Decoding) -> list[int]:
        """One forward and one reveal of all running sequences; returns the slots whose sequences ended."""
        active = sorted(state.active)
        wide = any(state.uncommitted_host[s] for s in active)
        furthest = (max(state.block_host[s] for s in active) + 1) * self.block_size
        context = min(-(-furthest // self.context_step) * self.context_step, cache.length)
        slots = list(range(self.slots)) if self.on_cuda else active
        self.forwards += 1
        self.wide_forwards += wide
        rows = self._all_slots if self.on_cuda else torch.tensor(active)

        def device_pass() -> Tensor:
            return self._on_device(state, cache, decoding, rows, context, wide)

        flags = self._graphs.run((wide, context, decoding), device_pass) if self._graphs else device_pass()
        return state.advance(slots, flags)

    def _on_device(
        self, state: SlotState, cache: SlotCache, decoding: Decoding, rows: Tensor, context: int, wide: bool
    ) -> Tensor:
        """The device's part of a pass over the slots `rows` [R], without synchronisation; returns bool [3, R]."""
        current = state.block[rows, None] * self.block_size + torch.arange(self.block_size, device=self.device)
        positions = current
        if wide:
            previous = current - self.block_size
            spare = cache.length + torch.arange(self.block_size, device=self.device)
            positions = torch.cat([torch.where(previous < 0, spare, previous), current], dim=1)
        ids = state.ids[rows[:, None], positions.clamp(max=state.ids.shape[1] - 1)]
        mask = decoding_mask(positions, context, self.block_size)
        hidden = hidden_states(self.model, ids, positions, mask, cache.at(rows, positions, context))
        logits = self.model.get_output_embeddings()(hidden[:, -self.block_size :])

        masked = state.masked[rows]
        noise = uniform(state.key[rows, None], current, state.round[rows, None])
        tokens, confidence, entropy = draw(logits, noise, decoding, self.mask_token_id)
        confidence = torch.where(masked, confidence, 0.0)
        reveal = choose(decoding.unmasking, masked, confidence, entropy)
        return state.reveal(rows, current, reveal, tokens, confidence, self.eos_token_id)


def draw(logits: Tensor, noise: Tensor, decoding: Decoding, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates for every position, by inverse-CDF sampling with one uniform number each.

    Args:
        logits: [..., V]; noise: float32 [...] in (0, 1).

    Returns:
        tokens int64 [...], their probability under the raw untempered softmax float32 [...], and that softmax's
        entropy in nats float32 [...] (zeros where no rule asks for it).
    """
    logits = logits.float()
    log_z = torch.logsumexp(logits, dim=-1)
    if isinstance(decoding.unmasking, EntropyBoundUnmasking):
        log_p = logits - log_z[..., None]
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    else:
        entropy = torch.zeros_like(log_z)

    choices = logits.clone()
    choices[..., mask_token_id] = -torch.inf
    if decoding.temperature == 0:
        tokens = choices.argmax(dim=-1)
    else:
        probabilities = torch.softmax(_truncate(choices / decoding.temperature, decoding), dim=-1)
        cdf = probabilities.cumsum(dim=-1)
        tokens = torch.searchsorted(cdf, (noise * cdf[..., -1])[..., None])[..., 0].clamp(max=logits.shape[-1] - 1)
    confidence = (logits.gather(-1, tokens[..., None])[..., 0] - log_z).exp()
    return tokens, confidence, entropy


def _truncate(logits: Tensor, decoding: Decoding) -> Tensor:
    """Top-k, then top-p (the smallest set of tokens whose probability reaches p)."""
    if decoding.top_k:
        kth = logits.topk(min(decoding.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if decoding.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(before >= decoding.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return logits
