"""Conversion: what makes a student of an ARLM, and what a checkpoint of one holds.

No weight changes. The student gets a mask token, for which a row may be added (common/mask_token.py), and its end
tokens (common/end_tokens.py); its config records both, with `block_size`, `attention_context` and how it is asked, so
that a checkpoint says how to decode it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.adapter_files import read_adapter
from common.chat import asked_with
from common.config.adapter import AdapterConfig
from common.config.model import AttentionContext
from common.config.run import RunConfig
from common.end_tokens import check_chat_template, end_token_ids, known_end_tokens
from common.gguf_files import model_folder
from common.lora import write_adapter
from common.mask_token import AUTO, NEW, set_mask_token
from common.model_files import ModelError, check_complete, check_plain, share_weights, stored_tensors
from common.student import (
    RECORDED,
    SUPPORTED_FAMILIES,
    Gathered,
    add_rows,
    check_family,
    fitted_head,
    head_of_folder,
    is_student,
    load_config,
    load_model,
    load_tokenizer,
    stored_shapes,
    student_architecture,
    third_party,
)
from common.vocabulary import check_tokenizer, token_count

# of a generation config: what has no meaning without do_sample, and what a checkpoint keeps in any case
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Conversion:
    """What makes a student of an ARLM: its config with `mask_token_id`, `block_size`, `attention_context` and
    `end_token_ids`, its tokenizer with the mask token, and what somebody should know about them."""

    config: Any
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...] = ()

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The one that ends a turn first."""
        return tuple(self.config.end_token_ids)


def convert(
    path: str,
    block_size: int,
    mask_token: str = "auto",
    *,
    end_tokens: Sequence[str] | None = None,
    chat_template: str | None = None,
    teacher_paths: Sequence[str] = (),
    context: AttentionContext = "block",
) -> Conversion:
    """The student that starts from the ARLM at `path`.

    Args:
        mask_token: as common/mask_token.py says.
        end_tokens: in place of those that the model's files name (common/end_tokens.py).
        chat_template: in place of the tokenizer's.
        teacher_paths: other models that the student learns from; what ends their responses ends the student's.
        context: what clean tokens see (common/masks.py).

    Raises:
        ModelError: the model cannot be a student, or it has no room for a mask token, or no end token.
    """
    config = load_config(path)
    check_family(config)
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    check_tokenizer(tokenizer, config.vocab_size)
    check_chat_template(tokenizer)
    ends = list(end_tokens_of(path, config, tokenizer, end_tokens))
    for teacher_path in teacher_paths if not end_tokens else ():
        teacher = load_tokenizer(teacher_path)
        ends += known_end_tokens(teacher, load_generation_config(teacher_path, load_config(teacher_path)))
    kept = {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id} - {None}
    if mask_token == NEW and is_student(config):
        mask_token = AUTO  # it has its new one already
    mask = set_mask_token(tokenizer, mask_token, config.vocab_size, kept)
    config.vocab_size = mask.rows
    config.mask_token_id = mask.id
    config.block_size = block_size
    config.attention_context = context
    config.end_token_ids = list(dict.fromkeys(ends))
    notes = [mask.note] if mask.note else []
    if tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: prompts are the user's text alone, unless one is given")
    return Conversion(config, tokenizer, tuple(notes))


def student_of(config: RunConfig) -> Conversion:
    """The student of a run; its config records under `opdlm` how it is asked (common/chat.py)."""
    model = config.model
    conversion = convert(
        model.path,
        config.block_size,
        model.mask_token,
        end_tokens=model.end_tokens,
        chat_template=config.data.chat_template,
        teacher_paths=[path for path in dict.fromkeys(config.teacher_paths.values()) if path != model.path],
        context=config.attention.context,
    )
    conversion.config.opdlm = asked_with(config.data)
    return conversion


def end_tokens_of(
    path: str, config: Any, tokenizer: PreTrainedTokenizerBase, named: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Those that are named, else those that a student's config records, else what `end_token_ids` finds.

    Raises:
        ModelError: see `end_token_ids`.
    """
    recorded = getattr(config, "end_token_ids", None)
    if recorded and not named:
        return tuple(recorded)
    return end_token_ids(tokenizer, load_generation_config(path, config), named)


def load_converted(
    path: str, conversion: Conversion, dtype: torch.dtype, attention: str, gathered: Gathered = nullcontext
) -> PreTrainedModel:
    """The ARLM at `path` with as many rows as its conversion asks for (see `add_rows`), and its attention context."""
    model = load_model(path, dtype, attention)
    model.config.attention_context = conversion.config.attention_context
    model.config.mask_token_id = conversion.config.mask_token_id
    if conversion.config.vocab_size > model.config.vocab_size:
        add_rows(model, conversion.config.vocab_size, gathered)
    return model


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's LM head [V, d], with as many rows as the student's, and how many of them count (None: all)."""

    weight: Tensor
    tokens: int | None = None


def teacher_heads_of(config: RunConfig, student: Conversion, device: torch.device) -> tuple[TeacherHead, ...]:
    """What the learner needs of the teachers where targets are hidden states, else nothing; teachers from one folder
    share theirs."""
    if config.target_kind != "hidden":
        return ()
    heads: dict[str, TeacherHead] = {}
    for path in config.teacher_paths.values():
        if path not in heads:
            head, tokens = head_of_folder(path), counted_tokens(student, path)
            if tokens is not None:
                head = fitted_head(head, tokens, student.config.vocab_size)
            heads[path] = TeacherHead(head.to(device, getattr(torch, config.teacher.dtype)), tokens)
    return tuple(heads[path] for path in config.teacher_paths.values())


def counted_tokens(student: Conversion, teacher_path: str) -> int | None:
    """Where student and teacher have different numbers of LM head rows: how many of the teacher's count, those of its
    tokens. Its distribution is over these; to what else a student has a row for it gives no probability. None: all
    rows of both."""
    teacher = load_config(teacher_path)
    if teacher.vocab_size == student.config.vocab_size:
        return None
    return min(token_count(load_tokenizer(teacher_path)), int(teacher.vocab_size))


def own_head(config: RunConfig, student: Conversion) -> dict[str, int | None]:
    """What a learner that teaches itself needs to know of its LM head, as a field of its BatchBuilder; else nothing."""
    return {"teacher_tokens": counted_tokens(student, config.teacher_path)} if config.teaches_itself else {}


def checked(path: str, conversion: Conversion) -> Conversion:
    """The conversion of the ARLM at `path`, after all that can be checked without loading the weights.

    Raises:
        ModelError: the model cannot be loaded, or could not be saved again.
    """
    check_weights(path)
    notes = check_saving(path, conversion)
    return replace(conversion, notes=(*conversion.notes, *notes))


def convert_folder(
    path: str,
    out: Path,
    block_size: int,
    mask_token: str,
    dtype: torch.dtype,
    end_tokens: Sequence[str] | None = None,
    chat_template: str | None = None,
    context: AttentionContext = "block",
) -> Conversion:
    """Write the converted, untrained student as a complete Hugging Face folder, or nothing.

    Raises:
        ModelError: the model cannot be a student.
    """
    conversion = convert(
        path, block_size, mask_token, end_tokens=end_tokens, chat_template=chat_template, context=context
    )
    conversion = checked(path, conversion)
    model = load_converted(path, conversion, dtype, "sdpa")
    with _whole_or_nothing(out) as partial:
        save_student(model, conversion, partial)
    return conversion


def merge_folder(path: str, out: Path, dtype: torch.dtype) -> None:
    """Write the student in an adapter's folder as a complete Hugging Face folder with merged weights, or nothing.

    Raises:
        ModelError: the folder holds no adapter, or one with a gate, which is no plain model.
    """
    adapter = read_adapter(path)
    if adapter is None:
        raise ModelError("holds no adapter that a run has written; give a checkpoint of a run with adapter.rank")
    if adapter.config.gated:
        raise ModelError(
            "is an adapter with the gate 'mask', which acts at mask positions only: no plain weights compute that; use "
            "the folder as it is, or train with adapter.gate 'none'"
        )
    model = load_model(path, dtype, "sdpa")
    with _whole_or_nothing(out) as partial:
        save_student(model, Conversion(model.config, load_tokenizer(path)), partial)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when all is written."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_student(
    model: PreTrainedModel,
    conversion: Conversion,
    out: Path,
    block_size: int | None = None,
    state_dict: dict[str, Tensor] | None = None,
    adapter: AdapterConfig | None = None,
    base: str = "",
) -> None:
    """Config, tokenizer and safetensors in `out`; `block_size` replaces the conversion's own, and `state_dict` the
    model's where it is sharded. With an `adapter` of the model at `base`, `state_dict` is the adapter's, and the
    model's own weights are left out."""
    for name in RECORDED:
        if hasattr(conversion.config, name):
            setattr(model.config, name, getattr(conversion.config, name))
    model.config.block_size = block_size or conversion.config.block_size
    drop_generation_parameters(model.config)
    model.generation_config, _ = mended(model.generation_config)
    model.generation_config.eos_token_id = list(conversion.end_tokens)
    if adapter and adapter.rank:
        write_adapter(out, adapter, str(Path(base).resolve()) if Path(base).exists() else base, state_dict or {})
        model.generation_config.save_pretrained(out)
    else:
        model.save_pretrained(out, state_dict=state_dict)
    model.config.architectures = [student_architecture(model.config)]
    model.config.save_pretrained(out)
    conversion.tokenizer.save_pretrained(out)
    share_weights(out)


def check_weights(path: str) -> None:
    """Refuse a local model whose weights are not all there, or not plain floats; a hub id passes.

    Raises:
        ModelError: names the first tensor that is wrong.
    """
    folder = Path(model_folder(path))
    if not folder.is_dir():
        return
    tensors = stored_tensors(folder)
    check_plain(tensors)
    config = load_config(path)
    if config.model_type in SUPPORTED_FAMILIES:  # others may store tensors in another form
        with (
            torch.device("meta"),
            third_party("has a config.json of which no model can be built", "correct it"),
        ):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        check_complete(stored_shapes(model), tensors)


def check_saving(path: str, conversion: Conversion) -> list[str]:
    """Write what a checkpoint holds beside its weights to a scratch folder, and read it again.

    Returns:
        What is changed in checkpoints, so that they can be saved.

    Raises:
        ModelError: transformers refuses to save it, or reads something else than was saved.
    """
    config, tokenizer = conversion.config, conversion.tokenizer
    generation, notes = mended(load_generation_config(path, config))
    generation.eos_token_id = list(conversion.end_tokens)
    dropped = drop_generation_parameters(config)
    if dropped:
        notes.append(f"config.json holds settings of generation; checkpoints leave out {', '.join(dropped)}")
    with TemporaryDirectory() as scratch:
        with third_party("could not be saved in a checkpoint", "save the model again with this transformers"):
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
    folder = Path(model_folder(path))
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    with third_party("has a generation_config.json that cannot be read", "correct or remove it"):
        return GenerationConfig.from_pretrained(model_folder(path))


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
