"""Sampling: one token for every masked position of a pass, and how sure the student is of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.config.unmasking import DynamicUnmasking, EntropyBoundUnmasking, Unmasking
from common.reshaping import truncate


@dataclass(frozen=True)
class Decoding:
    """How tokens are sampled and revealed: temperature 0 is greedy, `top_k` 0 and `top_p` 1 truncate nothing."""

    unmasking: Unmasking = DynamicUnmasking()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncated(self) -> bool:
        return bool(self.top_k) or self.top_p < 1

    @property
    def needs_entropy(self) -> bool:
        return isinstance(self.unmasking, EntropyBoundUnmasking)


class Candidates(NamedTuple):
    """A token for every position, which the unmasking rule may reveal; "raw" is the softmax before temperature and
    truncation, with the mask token in it."""

    tokens: Tensor  # int64 [...]
    confidence: Tensor  # float32 [...], their probability under the raw softmax
    entropy: Tensor  # float32 [...], of the raw softmax, nats; zeros where the rule does not need it


def sample_tokens(
    logits: Tensor, noise: Tensor, decoding: Decoding, mask_token_id: int, token_count: int | None = None
) -> Candidates:
    """Sample by inverse CDF with one uniform number a position, or take the argmax at temperature 0; never the mask
    token, and no id from `token_count` on (None: V), for which there is no token.

    Truncation is that of common/reshaping.py, after the temperature. On CUDA a Triton kernel answers where nothing is
    truncated and no entropy is needed. At temperature 0 the lowest of equally likely ids is taken.

    Args:
        logits: float32 [..., V]; noise: float32 [...] in (0, 1).
    """
    if logits.is_cuda and not (decoding.truncated or decoding.needs_entropy):
        from actors.sampler.kernels.sampling import sample_tokens_triton  # needs triton

        tokens, confidence = sample_tokens_triton(logits, noise, decoding.temperature, mask_token_id, token_count)
        return Candidates(tokens, confidence, torch.zeros_like(confidence))
    log_z = torch.logsumexp(logits, dim=-1)
    if decoding.needs_entropy:
        log_p = logits - log_z[..., None]
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    else:
        entropy = torch.zeros_like(log_z)

    if decoding.temperature == 0:
        tokens = _choices(logits, mask_token_id, token_count).argmax(dim=-1)
    else:
        tokens = inverse_cdf(probabilities(logits, decoding, mask_token_id, token_count), noise)
    confidence = (logits.gather(-1, tokens[..., None])[..., 0] - log_z).exp()
    return Candidates(tokens, confidence, entropy)


def probabilities(logits: Tensor, decoding: Decoding, mask_token_id: int, token_count: int | None = None) -> Tensor:
    """What tokens are drawn from at a temperature above 0, [..., V]; arguments as in `sample_tokens`."""
    choices = _choices(logits, mask_token_id, token_count) / decoding.temperature
    return truncate(choices, decoding.top_k, decoding.top_p).softmax(dim=-1)


def inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The tokens int64 [...] that uniform numbers [...] in (0, 1) choose from probabilities [..., V]."""
    cdf = probabilities.cumsum(dim=-1)
    chosen = torch.searchsorted(cdf, (noise * cdf[..., -1])[..., None])[..., 0]
    return chosen.clamp(max=probabilities.shape[-1] - 1)


def _choices(logits: Tensor, mask_token_id: int, token_count: int | None) -> Tensor:
    """The logits of what may be written; of all else -inf."""
    choices = logits.clone()
    choices[..., mask_token_id : mask_token_id + 1] = -torch.inf  # a model that has no mask token has no such row
    choices[..., token_count if token_count is not None else choices.shape[-1] :] = -torch.inf
    return choices
