"""Decoding by block diffusion for a causal LM of transformers: what `generate` of this folder's model does.

A sequence is decoded in blocks of `block_size` positions, counted from its position 0, prompt included. A block begins
masked, but for what the prompt has of it. Each forward proposes a token for every masked position, and the rule reveals
some of them, until none is masked. All tokens of a block see each other and the blocks before.

    static        reveals as many positions a forward as `steps_per_block` needs, the most confident first
    dynamic       reveals all positions above `threshold`, at least the most confident
    speculative   drafts a whole block, and keeps what the model's causal reading would have written

This file needs torch and transformers alone. Sequences of a batch are decoded one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging

_log = logging.get_logger(__name__)
_RULES = ("static", "dynamic", "speculative")
_KEEP_ROUND, _OWN_ROUND = 2**20, 2**20 + 1  # rounds of the random stream that no draft reaches
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # SplitMix64's, as int64


@dataclass(frozen=True)
class Settings:
    """How one sequence is decoded."""

    rule: str
    threshold: float
    per_step: int  # tokens that the static rule reveals in a forward
    draft_rounds: int
    block_size: int
    temperature: float  # 0: greedy
    top_k: int  # 0: all
    top_p: float  # 1: all
    mask_token_id: int
    token_count: int  # ids from there on have no token
    ends: tuple[int, ...]
    key: int  # of the random stream

    def noise(self, positions: Tensor, round_number: int) -> Tensor:
        """Uniform float32 in (0, 1), a hash of key, position and round."""
        rounds = torch.full_like(positions, round_number + 1)
        mixed = _splitmix64(_splitmix64(self.key + positions * _GOLDEN) + rounds * _MIX1)
        return (_shifted(mixed, 40).to(torch.float32) + 0.5) * 2.0**-24

    def choices(self, logits: Tensor) -> Tensor:
        """The logits of what may be written; of all else -inf."""
        choices = logits.clone()
        choices[..., self.mask_token_id] = -torch.inf
        choices[..., self.token_count :] = -torch.inf
        return choices

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from at a temperature above 0: the best `top_k`, of these the smallest set of mass
        `top_p`. Of equal logits the lower id comes first."""
        choices = self.choices(logits) / self.temperature
        if self.top_k or self.top_p < 1:
            ordered, order = choices.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                ordered[..., self.top_k :] = -torch.inf
            p = ordered.softmax(-1)
            ordered = ordered.masked_fill(p.cumsum(-1) - p >= self.top_p, -torch.inf) if self.top_p < 1 else ordered
            choices = torch.empty_like(choices).scatter(-1, order, ordered)
        return choices.softmax(dim=-1)

    def sample(self, logits: Tensor, noise: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        """A token for each row of the logits [n, V], and its probability under the raw softmax, [n] each."""
        tokens = self.choices(logits).argmax(dim=-1) if greedy else _drawn(self.probabilities(logits), noise)
        confidence = (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)).exp()
        if not confidence.isfinite().all():
            raise FloatingPointError("the model gave a logit that is not finite")
        return tokens, confidence

    def ends_in(self, ids: Tensor) -> bool:
        return not set(self.ends).isdisjoint(ids.tolist())


class Reader:
    """Forwards of one sequence, over a cache of the blocks before its present one."""

    def __init__(self, model: Any, block_size: int) -> None:
        self.model, self.block_size = model, block_size
        self.cache = DynamicCache()
        self.cached = 0  # positions
        self.causal = getattr(model.config, "attention_context", "block") == "causal"

    def read(self, ids: Tensor, start: int) -> Tensor:
        """Hidden states [n, d] of all positions that are not cached yet, up to the end of the block at `start`; what
        stands before it is final, and is cached from now on."""
        end = start + self.block_size
        q, k = torch.arange(self.cached, end, device=ids.device)[:, None], torch.arange(end, device=ids.device)
        # tokens of a finished block see its end, or in a causal context themselves; the present block sees its own end
        seen = (k <= q) | (q >= start) if self.causal else k // self.block_size <= q // self.block_size
        windows = _windows(self.model.config)
        masks = {kind: seen if width is None else seen & (q - k < width) for kind, width in windows.items()}
        four = {kind: mask[None, None] for kind, mask in masks.items()}
        output = self.model.model(
            input_ids=ids[None, self.cached : end],
            position_ids=q.T,
            attention_mask=four if len(four) > 1 else next(iter(four.values())),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cached = end
        self.rewind(start)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def rewind(self, position: int) -> None:
        """Forget what is cached from this position on."""
        if self.cached > position:
            self.cache.crop(position - self.cached)
        self.cached = position

    def logits(self, hidden: Tensor) -> Tensor:
        """In float32: in bfloat16 a logit of 10 would be rounded by up to 0.03."""
        head = self.model.get_output_embeddings().weight
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        return hidden.float() @ head.T.float()


class BlockDiffusion:
    """Put before a causal LM of transformers: its `generate` decodes by block diffusion.

    `forward` is the family's own, which reads causally.
    """

    config: Any
    generation_config: Any
    device: Any
    # else vLLM, told to trust the code, would put its attention into the layers and decode autoregressively
    _supports_attention_backend = False
    _can_set_attn_implementation_cached_value = False

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: Any = None,
        max_new_tokens: int | None = None,
        rule: str = "dynamic",
        threshold: float = 0.9,
        steps_per_block: int | None = None,
        draft_rounds: int = 1,
        block_size: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | list[int] | None = None,
    ) -> Tensor:
        """Prompts and responses, int64 [N, L + longest], shorter responses filled up with the padding token.

        Args:
            input_ids: int64 [N, L], shorter prompts padded on the left, where `attention_mask` is 0.
            generation_config: only its `max_new_tokens` is read; default: the model's own.
            max_new_tokens: default: that of the generation config, else 256.
            rule: `static`, `dynamic`, or `speculative`, which needs a model whose attention_context is `causal`.
            threshold: of the dynamic rule, and of drafts in several rounds.
            steps_per_block: of the static rule; default: one token a step.
            draft_rounds: of the speculative rule.
            block_size: default: the model's own.
            temperature: 0 is greedy; top_k 0 and top_p 1 truncate nothing.
            seed: row i of the batch draws from a stream of its own.
            eos_token_id: a response ends with any of these; default: the model's own.

        Raises:
            ValueError: an argument is out of its range.
        """
        size = int(block_size or self.config.block_size)
        limit = max_new_tokens or (generation_config or self.generation_config).max_new_tokens or 256
        ends = self.config.end_token_ids if eos_token_id is None else eos_token_id
        ends = tuple([ends] if isinstance(ends, int) else ends)
        if rule not in _RULES:
            raise ValueError(f"rule {rule!r} is none of {', '.join(_RULES)}")
        if rule == "speculative" and getattr(self.config, "attention_context", "block") != "causal":
            raise ValueError("rule 'speculative' needs a model whose attention_context is 'causal'; choose 'dynamic'")
        if steps_per_block and size % steps_per_block:
            raise ValueError(f"steps_per_block {steps_per_block} does not divide the block size {size}")
        if temperature < 0 or min(size, limit, draft_rounds, steps_per_block or 1) < 1:
            raise ValueError("temperature must not be negative, and counts must be at least 1")
        if self.config._attn_implementation != "sdpa":
            raise ValueError("decoding by block diffusion needs masks: load the model with attn_implementation='sdpa'")
        _log.warning_once(f"{self.config.origin}; it is decoded by block diffusion, in blocks of {size}")
        rows = []
        for number, row in enumerate(input_ids):
            prompt = row if attention_mask is None else row[attention_mask[number].bool()]
            key = int(np.random.SeedSequence([seed, number, 0]).generate_state(1, np.uint64).view(np.int64)[0])
            settings = Settings(
                rule, threshold, size // (steps_per_block or size), draft_rounds, size, temperature, top_k, top_p,
                self.config.mask_token_id, self.config.token_count, ends, key,
            )  # fmt: skip
            rows.append((_speculated if rule == "speculative" else _denoised)(self, prompt, limit, settings))
        padding = self.generation_config.pad_token_id
        width, fill = max(map(len, rows)), ends[0] if padding is None else padding
        responses = input_ids.new_full((len(rows), width), fill)
        for filled, response in zip(responses, rows, strict=True):
            filled[: len(response)] = response
        return torch.cat([input_ids, responses], dim=1)


def _denoised(model: Any, prompt: Tensor, most: int, settings: Settings) -> Tensor:
    """The response to the prompt under the static or the dynamic rule, int64 [n]."""
    size, length = settings.block_size, len(prompt)
    total = -(-(length + most) // size) * size
    ids = torch.cat([prompt, prompt.new_full((total - length,), settings.mask_token_id)])
    reader = Reader(model, size)
    for start in range(length // size * size, total, size):
        masked = torch.arange(max(start, length), start + size, device=ids.device)  # positions
        round_number = 0
        while len(masked):
            hidden = reader.read(ids, start)[-size:]
            logits = reader.logits(hidden[masked - start])
            noise = settings.noise(masked, round_number)
            tokens, confidence = settings.sample(logits, noise, greedy=settings.temperature == 0)
            if settings.rule == "static":
                shown = _most(confidence, settings.per_step)
            else:
                shown = (confidence > settings.threshold) | _most(confidence, 1)
            ids[masked[shown]] = tokens[shown]
            masked, round_number = masked[~shown], round_number + 1
        if settings.ends_in(ids[max(start, length) : start + size]):
            total = start + size
            break
    return _until_end(ids[length : min(total, length + most)], settings.ends)


def _speculated(model: Any, prompt: Tensor, most: int, settings: Settings) -> Tensor:
    """The response to the prompt under the speculative rule, int64 [n].

    The block behind the one that is verified is drafted in the same forward. A draft x, drawn from q, is kept with
    probability min(1, p(x) / q(x)), where p is the causal reading's distribution; else a token is drawn from what p has
    more than q (Leviathan et al., 2023, arXiv 2211.17192). The first that is not kept ends the test.
    """
    size, length = settings.block_size, len(prompt)
    if not length:
        raise ValueError("rule 'speculative' needs a token before the response: a prompt is empty")
    limit = length + most
    ids = torch.cat([prompt, prompt.new_full((-(-limit // size) * size + size - length,), settings.mask_token_id)])
    offsets = torch.arange(size, device=ids.device)
    greedy = settings.temperature == 0
    reader = Reader(model, size)
    start = length // size * size  # of the block that is drafted
    verifies = start == length  # the block before it is complete, but its drafts are not verified
    kept = size if verifies else length % size  # its tokens, from the first on, that are final
    masked = offsets >= length % size
    round_number = draft_round = drafted_in = 0
    draft_logits: Tensor | None = None
    while True:
        hidden = reader.read(ids, start)
        logits = reader.logits(hidden[-size:][masked])
        noise = settings.noise((start + offsets)[masked], round_number)
        drafts, confidence = settings.sample(logits, noise, greedy or settings.draft_rounds > 1)
        if verifies:
            before = start - size
            own, keeps = _verdicts(reader.logits(hidden[-2 * size : -size]), ids, before, kept, draft_logits, settings)
            wrong = [at for at in range(kept, size) if not keeps[at - 1]]
            if wrong:
                ids[before + wrong[0]] = own[wrong[0] - 1]
            known = before + (wrong[0] + 1 if wrong else size)
            if settings.ends_in(ids[max(before, length) : known]) or known >= limit:
                return _until_end(ids[length : min(known, limit)], settings.ends)
            if wrong:
                reader.rewind(before)
                draft_round = 0
                if known == start:  # all of the block is known now, but not what is cached of it
                    kept, round_number, masked = size, 0, offsets >= 0
                    continue
                start, verifies, kept = before, False, known - before
                masked, round_number = offsets >= kept, drafted_in + 1
                ids[known : before + size] = settings.mask_token_id
                continue
            kept = 1
            ids[start] = own[-1]
            if int(own[-1]) in settings.ends or start + 1 >= limit:
                return _until_end(ids[length : start + 1], settings.ends)
            drafts, confidence, logits, masked = drafts[1:], confidence[1:], logits[1:], masked & (offsets > 0)
        if settings.draft_rounds == 1 or draft_round >= settings.draft_rounds - 1:
            shown = torch.ones_like(confidence, dtype=torch.bool)
        else:
            shown = (confidence > settings.threshold) | _most(confidence, 1)
        at = offsets[masked]
        ids[start + at[shown]] = drafts[shown]
        if not greedy and settings.draft_rounds == 1:
            draft_logits = logits.new_zeros(size, logits.shape[-1]) if draft_logits is None else draft_logits
            draft_logits[at] = logits
        if bool(shown.all()):
            start, verifies, drafted_in, masked = start + size, True, round_number, offsets >= 0
            round_number = draft_round = 0
        else:
            verifies, masked = False, masked.index_fill(0, at[shown], False)
            round_number, draft_round = round_number + 1, draft_round + 1


def _verdicts(
    logits: Tensor, ids: Tensor, before: int, kept: int, draft_logits: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Of the block at `before`, from the logits [B, V] of its causal reading: entry j is the reading's own token at
    offset j + 1, int64 [B], and whether the draft there is kept, bool [B]."""
    size = settings.block_size
    column = torch.arange(size, device=ids.device)
    drafts = ids[before : before + size].roll(-1)
    positions = before + 1 + column
    if settings.temperature == 0:
        own, _ = settings.sample(logits, settings.noise(positions, _OWN_ROUND), greedy=True)
        return own, own == drafts
    p = settings.probabilities(logits)
    if draft_logits is None:
        q = torch.nn.functional.one_hot(drafts, logits.shape[-1]).to(p.dtype)
    else:
        q = settings.probabilities(draft_logits.roll(-1, 0))
    tested = (column + 1 >= kept) & (column + 1 < size)
    at = drafts[:, None]
    kept_with = (p.gather(-1, at) / q.gather(-1, at)).clamp(max=1)[:, 0]
    keeps = tested & (settings.noise(positions, _KEEP_ROUND) < kept_with)
    left = (p - q * tested[:, None]).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    own = _drawn(torch.where(total > 0, left / total, p), settings.noise(positions, _OWN_ROUND))
    return own, keeps


def _drawn(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The tokens int64 [n] that uniform numbers [n] choose from probabilities [n, V]."""
    cdf = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cdf, (noise * cdf[..., -1])[..., None])[..., 0]
    return chosen.clamp(max=probabilities.shape[-1] - 1)


def _most(confidence: Tensor, count: int) -> Tensor:
    """bool [n], the `count` highest of float [n]; of equal ones the first."""
    order = confidence.argsort(descending=True, stable=True)
    return torch.zeros_like(confidence, dtype=torch.bool).index_fill(0, order[:count], True)


def _until_end(ids: Tensor, ends: tuple[int, ...]) -> Tensor:
    """The ids up to and with the first end token."""
    first = next((at for at, token in enumerate(ids.tolist(), 1) if token in ends), len(ids))
    return ids[:first]


def _windows(config: Any) -> dict[str, int | None]:
    """By kind of attention layer, how many positions before its own a token sees; None: all."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # one kind, sliding where Mistral sets a window
        width = config.sliding_window if "mistral" in config.model_type else None
        return {"full_attention": width}
    return {kind: config.sliding_window if kind == "sliding_attention" else None for kind in set(kinds)}


def _splitmix64(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, whose own shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
