"""Sampling of candidates: one token for every position of a pass, and how sure the student is of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.run import DynamicUnmasking, EntropyBoundUnmasking, Unmasking
from common.reshaping import truncate


@dataclass(frozen=True)
class Decoding:
    """How tokens are sampled and revealed."""

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


def sample_tokens(
    logits: Tensor, noise: Tensor, decoding: Decoding, mask_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates for every position, by inverse-CDF sampling with one uniform number each.

    Args:
        logits: float32 [..., V]; noise: float32 [...] in (0, 1).

    Returns:
        tokens int64 [...], their probability under the raw untempered softmax float32 [...], and that softmax's
        entropy in nats float32 [...] (zeros where no rule asks for it).
    """
    if logits.is_cuda and not (decoding.truncated or decoding.needs_entropy):
        from actors.sampler.kernels.sampling import sample_tokens_triton

        tokens, confidence = sample_tokens_triton(logits, noise, decoding.temperature, mask_token_id)
        return tokens, confidence, torch.zeros_like(confidence)
    log_z = torch.logsumexp(logits, dim=-1)
    if decoding.needs_entropy:
        log_p = logits - log_z[..., None]
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    else:
        entropy = torch.zeros_like(log_z)

    choices = logits.clone()
    choices[..., mask_token_id] = -torch.inf
    if decoding.temperature == 0:
        tokens = choices.argmax(dim=-1)
    else:
        probabilities = truncate(choices / decoding.temperature, decoding.top_k, decoding.top_p).softmax(dim=-1)
        cdf = probabilities.cumsum(dim=-1)
        tokens = torch.searchsorted(cdf, (noise * cdf[..., -1])[..., None])[..., 0].clamp(max=logits.shape[-1] - 1)
    confidence = (logits.gather(-1, tokens[..., None])[..., 0] - log_z).exp()
    return tokens, confidence, entropy
