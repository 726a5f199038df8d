"""A student's folder as a sampler, and texts from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.end_tokens import response_text, set_end_tokens
from common.prompts import Prompt
from common.student import is_student, load_model, load_tokenizer
from common.trajectory import Trajectory
from common.vocabulary import token_count


def load_student(
    path: str, dtype: str, device: str | None = None, base: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a converted student's folder; default device: CUDA where there is one. `base`: of the
    adapter there, in place of the model that it names.

    The end tokens are in the model's generation config.

    Raises:
        ValueError: the folder's config has no mask_token_id, so it was never converted.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, getattr(torch, dtype), "sdpa", base).to(device)
    model.requires_grad_(False)
    if not is_student(model.config):
        raise ValueError(f"{path!r} has no mask_token_id in its config; convert it first: opdlm convert {path} OUT")
    tokenizer = load_tokenizer(path)
    set_end_tokens(model, tokenizer)
    return model, tokenizer


def load_verifier(path: str, dtype: str, device: str | None = None) -> PreTrainedModel:
    """The original at `path`, which verifies what a student drafts; default device: CUDA where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(path, getattr(torch, dtype), "sdpa").to(device).requires_grad_(False)


def sampler_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int | None,
    slots: int,
    seed: int = 0,
    verifier: PreTrainedModel | None = None,
) -> Sampler:
    """A sampler on a loaded student; default block size: the model's own; `verifier`: of `load_verifier`."""
    return Sampler(
        model,
        block_size=block_size or model.config.block_size,
        mask_token_id=model.config.mask_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        token_count=token_count(tokenizer),
        slots=slots,
        seed=seed,
        tokenizer=tokenizer,
        verifier=verifier,
    )


def generate_texts(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    decoding: Decoding,
    *,
    max_new_tokens: int,
) -> Iterator[tuple[Prompt, str, Trajectory]]:
    """Each prompt with its response's text and trajectory, as they end; the ordinals say which is which."""
    by_ordinal = {p.ordinal: p for p in prompts}
    requests = [Request(p.ordinal, 0, p.ids, max_new_tokens) for p in prompts]
    for trajectory in sampler.generate(requests, decoding):
        text = response_text(tokenizer, trajectory.response_ids, sampler.eos_token_id)
        yield by_ordinal[trajectory.ordinal], text, trajectory
