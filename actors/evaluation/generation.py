"""A student's folder loaded as a sampler, and the texts that it generates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.prompts import prompt_ids
from common.student import load_model, load_tokenizer
from common.trajectory import Trajectory


def load_student(path: str, dtype: str, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a converted student's folder; default device: CUDA where there is one.

    Raises:
        ValueError: the folder's config has no mask_token_id, because it was never converted.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, getattr(torch, dtype), "sdpa").to(device)
    model.requires_grad_(False)
    if getattr(model.config, "mask_token_id", None) is None:
        raise ValueError(f"{path!r} has no mask_token_id in its config; convert it first: opdlm convert {path} OUT")
    return model, load_tokenizer(path)


def sampler_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int | None, slots: int, seed: int = 0
) -> Sampler:
    """A sampler for a loaded student; default block size: the model's own."""
    return Sampler(
        model,
        block_size=block_size or model.config.block_size,
        mask_token_id=model.config.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        slots=slots,
        seed=seed,
    )


def generate_texts(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[np.ndarray],
    decoding: Decoding,
    *,
    max_new_tokens: int,
) -> list[tuple[str, Trajectory]]:
    """Response text and trajectory of each prompt (int32 ids), in the order of the prompts."""
    requests = [Request(i, 0, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
    done: dict[int, Any] = {t.ordinal: t for t in sampler.generate(requests, decoding)}
    return [(tokenizer.decode(done[i].response_ids, skip_special_tokens=True), done[i]) for i in range(len(prompts))]


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> np.ndarray:
    """int32 ids of a prompt; `chat` applies the chat template."""
    if chat:
        return prompt_ids(tokenizer, prompt)
    return np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=np.int32)
