"""The block-diffusion sampler: continuous batching over slots, cached blocks, fused commits.

A pass is one forward of every running sequence's current block against its cached prefix, followed by one batched
choice of tokens. When a block is done, its clean tokens are committed to the cache in the same forward that first
denoises the next block: the forward then has 2B rows per sequence, and the commit rows do not see the next block.
A slot whose sequence has ended is refilled before the next pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.cache import SlotCache
from actors.unmasking import choose
from common.config import DynamicUnmasking, EntropyBoundUnmasking, Unmasking
from common.masks import decoding_mask
from common.seeds import stream_key, uniform
from common.student import hidden_states
from common.trajectory import Trajectory

_CONTEXT_STEP = 32  # the visible cache grows in steps, so that shapes repeat


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn and revealed."""

    unmasking: Unmasking = DynamicUnmasking()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


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


class Sampler:
    """Generates trajectories with the model's current weights; `weights_version` is stamped on each.

    `forwards` counts the passes of the model after prefill, `wide_forwards` those that carried commits.
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
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.slots = slots
        self.seed = seed
        self.device = model.get_output_embeddings().weight.device
        self.weights_version = 0
        self.forwards = 0
        self.wide_forwards = 0
        self._cache: SlotCache | None = None

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request], decoding: Decoding) -> Iterator[Trajectory]:
        """Yield each trajectory as it ends.

        Raises:
            FloatingPointError: the model gave a non-finite logit at a sampled position.
        """
        waiting = deque(requests)
        longest = max((self._end(r) for r in waiting), default=0)
        cache = self._cache_of(longest)
        state = _SlotState(self.slots, longest, self.block_size, self.device)
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

    def _cache_of(self, length: int) -> SlotCache:
        if self._cache is None or self._cache.length < length:
            self._cache = None
            rounded = -(-length // _CONTEXT_STEP) * _CONTEXT_STEP
            self._cache = SlotCache(
                self.model.config, self.slots, rounded, self.block_size, self.model.dtype, self.device
            )
        return self._cache

    def _keys(self, admitted: dict[int, Request]) -> Tensor:
        keys = [stream_key(self.seed, r.ordinal, r.sample) for r in admitted.values()]
        return torch.tensor(keys, dtype=torch.int64, device=self.device)

    def _prefill(self, state: _SlotState, cache: SlotCache, slots: list[int]) -> None:
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

    def _pass(self, state: _SlotState, cache: SlotCache, decoding: Decoding) -> list[int]:
        """One forward and one reveal of all running sequences; returns the slots whose sequences ended."""
        active = sorted(state.active)
        rows = torch.tensor(active, device=self.device)
        current = state.block[rows, None] * self.block_size + torch.arange(self.block_size, device=self.device)
        wide = any(state.uncommitted_host[s] for s in active)
        positions = current
        if wide:
            previous = current - self.block_size
            spare = cache.length + torch.arange(self.block_size, device=self.device)
            positions = torch.cat([torch.where(previous < 0, spare, previous), current], dim=1)
        furthest = (max(state.block_host[s] for s in active) + 1) * self.block_size
        context = min(-(-furthest // _CONTEXT_STEP) * _CONTEXT_STEP, cache.length)

        ids = state.ids[rows[:, None], positions.clamp(max=state.ids.shape[1] - 1)]
        mask = decoding_mask(positions, context, self.block_size)
        hidden = hidden_states(self.model, ids, positions, mask, cache.at(rows, positions, context))
        logits = self.model.get_output_embeddings()(hidden[:, -self.block_size :])
        self.forwards += 1
        self.wide_forwards += wide

        masked = state.masked[rows]
        noise = uniform(state.key[rows, None], current, state.round[rows, None])
        tokens, confidence, entropy = draw(logits, noise, decoding, self.mask_token_id)
        confidence = torch.where(masked, confidence, 0.0)
        reveal = choose(decoding.unmasking, masked, confidence, entropy)
        return state.reveal(active, rows, current, reveal, tokens, confidence, self.eos_token_id)


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


class _SlotState:
    """What the sampler knows of every slot: tensors on the device, and the few integers that the host plans with."""

    def __init__(self, slots: int, length: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.active: dict[int, Request] = {}
        self.block_host = [0] * slots
        self.uncommitted_host = [False] * slots
        self.denoise_forwards = [0] * slots
        self.commit_forwards = [0] * slots

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ids = zeros(slots, max(length, block_size))
        self.reveal_round = zeros(slots, max(length, block_size), dtype=torch.int16)
        self.confidence = zeros(slots, max(length, block_size), dtype=torch.float32)
        self.masked = zeros(slots, block_size, dtype=torch.bool)
        self.block = zeros(slots)
        self.end_block = zeros(slots)
        self.prompt_length = zeros(slots)
        self.round = zeros(slots)
        self.key = zeros(slots)

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
            self.uncommitted_host[slot] = False
            self.denoise_forwards[slot] = self.commit_forwards[slot] = 0
        rows = torch.tensor(list(admitted), device=self.device)
        lengths = torch.tensor([len(r.prompt_ids) for r in admitted.values()], device=self.device)
        self.prompt_length[rows] = lengths
        self.block[rows] = lengths // size
        self.end_block[rows] = torch.tensor([end_of(r) // size for r in admitted.values()], device=self.device)
        self.masked[rows] = torch.arange(size, device=self.device) >= (lengths % size)[:, None]
        self.round[rows] = 0
        self.key[rows] = keys
        self.active.update(admitted)

    def reveal(
        self,
        active: list[int],
        rows: Tensor,
        current: Tensor,
        reveal: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        eos_token_id: int,
    ) -> list[int]:
        """Write the revealed tokens, advance finished blocks; returns the slots whose sequences ended."""
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
        self.masked[rows] = masked | advance[:, None]
        self.block[rows] += advance
        self.round[rows] = torch.where(block_done, 0, self.round[rows] + 1)

        broken = ~torch.isfinite(confidence).all(dim=1)
        advanced, finished, failed = torch.stack([advance, ended, broken]).tolist()  # the pass's only sync
        if any(failed):
            bad = [self.active[s].ordinal for s, f in zip(active, failed, strict=True) if f]
            raise FloatingPointError(f"non-finite logits at sampled positions of prompts with ordinals {bad}")
        for slot, has_advanced in zip(active, advanced, strict=True):
            self.denoise_forwards[slot] += 1
            self.commit_forwards[slot] += self.uncommitted_host[slot]
            self.block_host[slot] += has_advanced
            self.uncommitted_host[slot] = bool(has_advanced)
        return [slot for slot, has_ended in zip(active, finished, strict=True) if has_ended]

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
            start = len(request.prompt_ids)
            end = (self.block_host[slot] + 1) * self.block_size
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
                    denoise_forwards=self.denoise_forwards[slot],
                    commit_forwards=self.commit_forwards[slot],
                )
            )
        return result
