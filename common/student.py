"""The student: the ARLM's own Hugging Face class, read with block-causal masks.

Conversion changes no weight. It makes sure that there is a mask token whose embedding row exists, and records
`mask_token_id` and `block_size` in the config, so that a checkpoint says how to decode it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.model_files import ModelError, check_complete, check_plain, head_of, stored_tensors

# families whose attention takes prebuilt masks, one for each kind of layer
SUPPORTED_FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma3_text")
# of a generation config: what has no meaning without do_sample, and what a checkpoint keeps in any case
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_config(path: str) -> Any:
    """The transformers config of the model at `path`.

    Raises:
        ModelError: transformers cannot read it, or only by running code from the model's repository.
    """
    with _third_party(
        "has a config.json that cannot be read", "correct it, or install a version of transformers that knows it"
    ):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`.

    Raises:
        ModelError: transformers cannot read it, or only by running code from the model's repository.
    """
    with _third_party(
        "has a tokenizer that cannot be read",
        "copy it from the model's repository, or install a version of transformers that knows it",
    ):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_model(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal LM at `path` in evaluation mode, parameters in `dtype` [no gradient turned off].

    Raises:
        ModelError: the family's attention cannot be made block-causal by a prebuilt mask.
    """
    config = load_config(path)
    check_family(config)
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    return model.eval()


@contextmanager
def _third_party(complaint: str, remedy: str) -> Iterator[None]:
    """What transformers and tokenizers raise about a model's files, of any class, as one sentence."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{complaint}: it needs code from the model's repository, which is never run here; give a model whose "
                "model_type transformers knows"
            ) from error
        raise ModelError(f"{complaint} ({' '.join(str(error).split())[:300]}); {remedy}") from error


def check_family(config: Any) -> None:
    """Refuse a model that block-causal masks alone do not make a student, with the reason."""
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            raise ModelError(
                f"has model_type {config.model_type!r}, which soft-caps its logits ({cap} {getattr(config, cap)}); "
                "neither the attention nor the loss here do, so student and teacher would differ; choose another"
            )
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ModelError(
            f"has model_type {config.model_type!r}, which is not supported: its attention must take prebuilt masks; "
            f"choose one of {', '.join(SUPPORTED_FAMILIES)}"
        )
    unknown = set(_layer_kinds(config)) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"has attention layers {sorted(unknown)}; only full_attention and sliding_attention can be "
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
        ModelError: the model cannot be a student, or no embedding row is free for the mask token.
    """
    config = load_config(path)
    check_family(config)
    tokenizer = load_tokenizer(path)
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    if tokenizer.mask_token_id >= config.vocab_size:
        raise ModelError(
            f"has no room for a mask token: it needs id {tokenizer.mask_token_id}, but the embedding has "
            f"{config.vocab_size} rows; "
            "use a model with a spare row, or set model.mask_token to an unused token that exists"
        )
    config.mask_token_id = tokenizer.mask_token_id
    config.block_size = block_size
    return config, tokenizer


def checked_conversion(path: str, block_size: int, mask_token: str) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """As `convert`, after all that can be checked without loading the weights; and what differs in checkpoints.

    Raises:
        ModelError: the model cannot be a student, cannot be loaded, or could not be saved again.
    """
    config, tokenizer = convert(path, block_size, mask_token)
    check_weights(path, config)
    return config, tokenizer, check_saving(path, config, tokenizer)


def convert_folder(path: str, out: Path, block_size: int, mask_token: str, dtype: torch.dtype) -> None:
    """Write the converted, untrained student as a complete Hugging Face folder, or nothing.

    Raises:
        ModelError: the model cannot be a student.
    """
    config, tokenizer, _ = checked_conversion(path, block_size, mask_token)
    model = load_model(path, dtype, "sdpa")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_student(model, tokenizer, partial, config.block_size, config.mask_token_id)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    drop_generation_parameters(model.config)
    model.generation_config, _ = mended(model.generation_config)
    model.save_pretrained(out, state_dict=state_dict)
    tokenizer.save_pretrained(out)


def check_weights(path: str, config: Any) -> None:
    """Refuse a local model whose weights are not all there, or not plain floats; a hub id passes.

    Raises:
        ModelError: names the first tensor that is wrong.
    """
    if not Path(path).is_dir():
        return
    tensors = stored_tensors(Path(path))
    check_plain(tensors)
    if config.model_type in SUPPORTED_FAMILIES:  # others may store tensors in another form
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        check_complete({name: tuple(p.shape) for name, p in model.named_parameters()}, tensors)


def check_saving(path: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Write what a checkpoint holds beside its weights to a scratch folder, and read it again.

    Returns:
        What is changed in checkpoints, so that they can be saved.

    Raises:
        ModelError: transformers refuses to save it, or reads something else than was saved.
    """
    generation, notes = mended(load_generation_config(path, config))
    dropped = drop_generation_parameters(config)
    if dropped:
        notes.append(f"config.json holds settings of generation; checkpoints leave out {', '.join(dropped)}")
    with TemporaryDirectory() as scratch:
        with _third_party("could not be saved in a checkpoint", "save the model again with this transformers"):
            for part in (config, generation, tokenizer):
                part.save_pretrained(scratch)
        again = load_tokenizer(scratch)
    if again.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            "has a tokenizer that is another after saving and loading it; save it again with this version of "
            "transformers"
        )
    return notes


def load_generation_config(path: str, config: Any) -> GenerationConfig:
    """What generation_config.json says; where it is missing, what transformers takes from config.json.

    Raises:
        ModelError: it cannot be read.
    """
    if Path(path).is_dir() and not (Path(path) / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    with _third_party("has a generation_config.json that cannot be read", "correct or remove it"):
        return GenerationConfig.from_pretrained(path)


def mended(generation: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """A generation config that can be saved, and what had to be left out: transformers loads ones that it will not
    save."""
    if _can_be_saved(generation):
        return generation, []
    kept = GenerationConfig(
        **{k: v for k, v in generation.to_dict().items() if generation.do_sample or k not in _SAMPLING}
    )
    if not _can_be_saved(kept):
        kept = GenerationConfig(**{name: getattr(generation, name) for name in _TOKENS})
    before, after = generation.to_diff_dict(), kept.to_diff_dict()
    left_out = ", ".join(sorted(f"{name} {value}" for name, value in before.items() if after.get(name) != value))
    return kept, [f"generation_config.json cannot be saved as it is; checkpoints leave out {left_out}"]


def drop_generation_parameters(config: Any) -> list[str]:
    """Take out of a model's config what belongs into a generation config, with which transformers would not save it;
    returns their names."""
    names = sorted(config._get_generation_parameters())
    for name in names:
        delattr(config, name)
    return names


def _can_be_saved(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


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
        ModelError: neither an LM head nor an embedding is in its files, or they are not whole.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    tensors = stored_tensors(folder)
    name = head_of(tensors)
    with safe_open(tensors[name].file, framework="pt") as file:
        return file.get_tensor(name)
