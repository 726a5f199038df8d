"""The student: the ARLM's own Hugging Face class, read with block-causal masks.

Conversion changes no weight. It makes sure that there is a mask token whose embedding row exists, and records
`mask_token_id` and `block_size` in the config, so that a checkpoint says how to decode it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# families whose attention takes prebuilt masks, one for each kind of layer
SUPPORTED_FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma3_text")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def load_model(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal LM at `path` in evaluation mode, parameters in `dtype` [no gradient turned off].

    Raises:
        ValueError: the family's attention cannot be made block-causal by a prebuilt mask.
    """
    check_family(AutoConfig.from_pretrained(path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    return model.eval()


def check_family(config: Any) -> None:
    """Refuse a model that block-causal masks alone do not make a student, with the reason."""
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            raise ValueError(
                f"model_type {config.model_type!r} soft-caps its logits ({cap} {getattr(config, cap)}), which neither "
                "the attention nor the loss here do: student and teacher would differ; choose a model without"
            )
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; its attention must take prebuilt masks. "
            f"Supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    unknown = set(_layer_kinds(config)) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"model has attention layers {sorted(unknown)}; only full_attention and sliding_attention can be "
            "block-causal here: choose another model"
        )


def attention_windows(config: Any) -> dict[str, int | None]:
    """The window of each kind of attention layer in the model, in positions; None: full attention.

    In a sliding-window layer a query of the student sees what block-causal attention allows and what lies fewer than
    `window` positions before it; its own block it sees to the end.
    """
    return {kind: config.sliding_window if kind == "sliding_attention" else None for kind in _layer_kinds(config)}


def _layer_kinds(config: Any) -> list[str]:
    """The kinds of attention layers, each once."""
    if getattr(config, "layer_types", None):
        return sorted(set(config.layer_types))
    # Mistral has one kind: sliding where a window is set
    slides = config.model_type == "mistral" and config.sliding_window is not None
    return ["sliding_attention" if slides else "full_attention"]


def default_attention() -> str:
    """SDPA with a dense mask on CPU, FlexAttention on CUDA."""
    return "flex_attention" if torch.cuda.is_available() else "sdpa"


def convert(path: str, block_size: int, mask_token: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Config and tokenizer of the student that starts from the ARLM at `path`.

    An existing mask token is kept. Otherwise `mask_token` becomes the next free id, whose embedding row must exist:
    the embedding is never resized.

    Raises:
        ValueError: no embedding row is free for the mask token.
    """
    config = AutoConfig.from_pretrained(path)
    check_family(config)
    tokenizer = load_tokenizer(path)
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    if tokenizer.mask_token_id >= config.vocab_size:
        raise ValueError(
            f"the mask token needs id {tokenizer.mask_token_id}, but the embedding has {config.vocab_size} rows; "
            "use a model with a spare row, or set model.mask_token to an unused token that exists"
        )
    config.mask_token_id = tokenizer.mask_token_id
    config.block_size = block_size
    return config, tokenizer


def convert_folder(path: str, out: Path, block_size: int, mask_token: str, dtype: torch.dtype) -> None:
    """Write the converted, untrained student as a complete Hugging Face folder."""
    config, tokenizer = convert(path, block_size, mask_token)
    model = load_model(path, dtype, "sdpa")
    save_student(model, tokenizer, out, config.block_size, config.mask_token_id)


def save_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    block_size: int,
    mask_token_id: int,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Config, tokenizer and safetensors in `out`; `state_dict` replaces the model's own where it is sharded."""
    model.config.mask_token_id = mask_token_id
    model.config.block_size = block_size
    model.save_pretrained(out, state_dict=state_dict)
    tokenizer.save_pretrained(out)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary without the mask token: equal for teacher and student if ids mean the same."""
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if t != tokenizer.mask_token}
    lines = "\n".join(f"{i}\t{t}" for t, i in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def hidden_states(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    mask: Any,
    **attention: Any,
) -> Tensor:
    """Final hidden states [R, N, d] (after the last norm) under a prebuilt mask.

    Args:
        ids, positions: int64 [R, N].
        mask: bool [R, 1, N, keys] or a BlockMask for every layer, or one by kind of layer.
        attention: what the model's attention implementation takes beyond the mask.
    """
    output = model.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
        **attention,
    )
    return output.last_hidden_state


def full_precision_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., d] times the LM head [V, d], in at least float32 [..., V].

    In bfloat16 a logit of 10 would be rounded by up to 0.03. No gradient flows from half precision.
    """
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], len(weight))
    return hidden.float() @ weight.T.float()


def lm_head_weight(model: PreTrainedModel) -> nn.Parameter:
    """[V, d]; the embedding itself where the two are tied."""
    return model.get_output_embeddings().weight


def head_of_folder(path: str) -> Tensor:
    """The LM head [V, d] of a model on disk, without loading the rest where the folder is local.

    Raises:
        ValueError: neither an LM head nor an embedding is in the safetensors files.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    for wanted in ("lm_head.weight", "model.embed_tokens.weight"):  # tied models store the embedding only
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                if wanted in tensors.keys():  # noqa: SIM118 (not a dict)
                    return tensors.get_tensor(wanted)
    raise ValueError(f"no lm_head.weight or model.embed_tokens.weight in the safetensors files of {path!r}")
