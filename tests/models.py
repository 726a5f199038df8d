"""Tiny random models for tests: complete Hugging Face folders that every engine here can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deploy.demo.tiny_arlm import CHAT_TEMPLATE, END, PAD, ROLES, START, build_tokenizer


def tiny_tokenizer(*special: str, eos: str = END, chat_template: str | None = CHAT_TEMPLATE, **options: Any) -> Any:
    """The shipped tokenizer without its mask token: 256 bytes, <|pad|>, <|im_start|>, <|im_end|> and three role names
    (ids 0 to 261), and `special` tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, START, END)])
    backend.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=PAD, chat_template=chat_template, **options
    )


def tiny_qwen3(
    path: Path,
    seed: int = 0,
    *,
    tokenizer: Any = None,
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
    `<|mask|>`, 263 tokens; or `tokenizer`. The embedding has `vocab` rows. Equal arguments give equal weights.
    """
    torch.manual_seed(seed)
    tokenizer = tokenizer or build_tokenizer()
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


# what each family needs beyond the shared sizes; three layers, so that sliding and full attention take turns
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "llama": {"model_type": "llama"},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 6},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 32,
    },
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}


def tiny_family(path: Path, family: str, seed: int = 0, **changes: Any) -> str:
    """Saves a tiny random model of a family with the shipped tokenizer in `path`; returns the folder as a string."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    options = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **(EXPERTS if family == "qwen3-moe" else FAMILIES.get(family, {"model_type": family})),
        **changes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def tiny_gguf(path: Path, model: str, quantised: bool = False) -> Path:
    """Writes the tiny Qwen3 in the folder `model`, with its tokenizer, as a GGUF file in llama.cpp's terms."""
    import gguf

    config = AutoConfig.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    known[config.vocab_size - 1] = "ĀĀ"  # two zero bytes: there must be one merge, and no text of ours has it
    special = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([known.get(i, f"[PAD{i}]") for i in range(config.vocab_size)])
    kinds = gguf.TokenType
    writer.add_token_types([
        (kinds.CONTROL if special[i] else kinds.USER_DEFINED) if i in special
        else kinds.NORMAL if i in known else kinds.UNUSED for i in range(config.vocab_size)
    ])  # fmt: skip
    writer.add_token_merges(["Ā Ā"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        array = weight.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
