"""Tiny random models for tests: complete Hugging Face folders that every engine here can load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from deploy.tiny_arlm import build_tokenizer


def tiny_qwen3(
    path: Path,
    seed: int = 0,
    *,
    vocab: int = 288,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    max_length: int = 512,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Saves a random Qwen3 with its tokenizer in `path` and returns that folder as a string.

    The tokenizer is that of the shipped tiny model: a chat template, eos `<|im_end|>`, pad `<|pad|>` and mask
    `<|mask|>`. It has 263 tokens, and the embedding `vocab` rows. Equal arguments give equal weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        # not the 10,000 that an engine takes which cannot read this field
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        # the usual 0.02 gives almost uniform predictions, which would hide errors
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
