"""The student: the ARLM's own Hugging Face class, read with block-causal masks.

Conversion changes no weight. It makes sure that there is a mask token whose embedding row exists, and records
`mask_token_id` and `block_size` in the config, so that a checkpoint says how to decode it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
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

from common.chat import asked_with
from common.config.run import RunConfig
from common.end_tokens import check_chat_template, end_token_ids, known_end_tokens
from common.gguf_files import model_folder
from common.mask_token import AUTO, NEW, set_mask_token
from common.model_files import ModelError, check_complete, check_plain, head_of, stored_tensors

# families whose attention takes prebuilt masks, one for each kind of layer
SUPPORTED_FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "gemma3_text")
# of a generation config: what has no meaning without do_sample, and what a checkpoint keeps in any case
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_RECORDED = ("mask_token_id", "block_size", "end_token_ids", "opdlm")  # what makes a student of a model's config
_LEAST_TOKENS = 16  # a tokenizer without its files still has its special tokens
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_config(path: str) -> Any:
    """The transformers config of the model at `path`.

    Raises:
        ModelError: transformers cannot read it, or only by running code from the model's repository.
    """
    with _third_party(
        "has a config.json that cannot be read", "correct it, or install a version of transformers that knows it"
    ):
        return AutoConfig.from_pretrained(model_folder(path), trust_remote_code=False)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`.

    Raises:
        ModelError: transformers cannot read it, or only by running code from the model's repository.
    """
    with _third_party(
        "has a tokenizer that cannot be read",
        "copy it from the model's repository, or install a version of transformers that knows it",
    ):
        return AutoTokenizer.from_pretrained(model_folder(path), trust_remote_code=False)


def load_model(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal LM at `path` in evaluation mode, parameters in `dtype` [no gradient turned off].

    Raises:
        ModelError: the family's attention cannot be made block-causal by a prebuilt mask.
    """
    config = load_config(path)
    check_family(config)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(path), config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    return model.eval()


@contextmanager
def _third_party(complaint: str, remedy: str) -> Iterator[None]:
    """What transformers and tokenizers raise about a model's files, of any class, as one sentence."""
    try:
        yield
    except ModelError:
        raise
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


@dataclass(frozen=True)
class Conversion:
    """What makes a student of an ARLM: its config with `mask_token_id`, `block_size` and `end_token_ids`, its tokenizer
    with the mask token, and what somebody should know about them."""

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
    teacher_path: str | None = None,
) -> Conversion:
    """The student that starts from the ARLM at `path`.

    Args:
        mask_token: as common/mask_token.py says.
        end_tokens: in place of those that the model's files name (common/end_tokens.py).
        chat_template: in place of the tokenizer's.
        teacher_path: another model that the student learns from; what ends its responses ends the student's.

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
    if teacher_path and not end_tokens:
        teacher = load_tokenizer(teacher_path)
        ends += known_end_tokens(teacher, load_generation_config(teacher_path, load_config(teacher_path)))
    kept = {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id} - {None}
    if mask_token == NEW and getattr(config, "mask_token_id", None) is not None:
        mask_token = AUTO  # it has its new one already
    mask = set_mask_token(tokenizer, mask_token, config.vocab_size, kept)
    config.vocab_size = mask.rows
    config.mask_token_id = mask.id
    config.block_size = block_size
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
        teacher_path=config.teacher_path if config.teacher_path != model.path else None,
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


Gathered = Callable[[nn.Parameter], AbstractContextManager[Any]]  # makes a partitioned parameter whole


def load_converted(
    path: str, conversion: Conversion, dtype: torch.dtype, attention: str, gathered: Gathered = nullcontext
) -> PreTrainedModel:
    """The ARLM at `path` with as many rows as its conversion asks for; see `add_rows`."""
    model = load_model(path, dtype, attention)
    if conversion.config.vocab_size > model.config.vocab_size:
        add_rows(model, conversion.config.vocab_size, gathered)
    return model


def add_rows(model: PreTrainedModel, rows: int, gathered: Gathered = nullcontext) -> None:
    """Let embedding and LM head grow to `rows`; each new row is the mean of the old ones, on every rank the same.

    They are whole afterwards. (transformers' own resize draws random rows, and fills them on one rank only.)
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for part in (embedding,) if tied else (embedding, head):
        with gathered(part.weight):
            old = part.weight.detach().clone()
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        part.weight = nn.Parameter(torch.cat([old, mean.expand(rows - len(old), -1)]), part.weight.requires_grad)
    if tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = model.config.vocab_size = rows


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
) -> Conversion:
    """Write the converted, untrained student as a complete Hugging Face folder, or nothing.

    Raises:
        ModelError: the model cannot be a student.
    """
    conversion = convert(path, block_size, mask_token, end_tokens=end_tokens, chat_template=chat_template)
    conversion = checked(path, conversion)
    model = load_converted(path, conversion, dtype, "sdpa")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_student(model, conversion, partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return conversion


def save_student(
    model: PreTrainedModel,
    conversion: Conversion,
    out: Path,
    block_size: int | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Config, tokenizer and safetensors in `out`; `block_size` replaces the conversion's own, and `state_dict` the
    model's where it is sharded."""
    for name in _RECORDED:
        if hasattr(conversion.config, name):
            setattr(model.config, name, getattr(conversion.config, name))
    model.config.block_size = block_size or conversion.config.block_size
    drop_generation_parameters(model.config)
    model.generation_config, _ = mended(model.generation_config)
    model.generation_config.eos_token_id = list(conversion.end_tokens)
    model.save_pretrained(out, state_dict=state_dict)
    conversion.tokenizer.save_pretrained(out)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        ModelError: it has hardly any tokens, or ones for which the embedding, of `rows`, has no row.
    """
    vocabulary = tokenizer.get_vocab()
    added = set(tokenizer.added_tokens_decoder)
    plain = {token: number for token, number in vocabulary.items() if number not in added}
    if len(plain) < _LEAST_TOKENS:
        raise ModelError(
            f"has an empty tokenizer ({type(tokenizer).__name__} with {len(plain)} tokens beside the special ones): "
            "its files are missing (tokenizer.json, tokenizer.model, or vocab.json and merges.txt); copy them from the "
            "model's repository"
        )
    last = max(plain, key=plain.__getitem__)
    if plain[last] >= rows:
        raise ModelError(
            f"has a tokenizer with ids up to {plain[last]} ({last!r}) and an embedding of {rows} rows; give the "
            "tokenizer that belongs to the model"
        )


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
            _third_party("has a config.json of which no model can be built", "correct it"),
        ):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        check_complete({name: tuple(p.shape) for name, p in model.named_parameters()}, tensors)


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
    folder = Path(model_folder(path))
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    with _third_party("has a generation_config.json that cannot be read", "correct or remove it"):
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


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids below this one are tokens; a model's further rows are padding, and mean nothing."""
    return max(tokenizer.get_vocab().values()) + 1


def counted_tokens(student: Conversion, teacher_path: str) -> int | None:
    """Where student and teacher have different numbers of LM head rows: how many of the teacher's count, those of its
    tokens. Its distribution is over these; to what else a student has a row for it gives no probability. None: all
    rows of both."""
    teacher = load_config(teacher_path)
    if teacher.vocab_size == student.config.vocab_size:
        return None
    return min(token_count(load_tokenizer(teacher_path)), int(teacher.vocab_size))


def fitted_head(head: Tensor, tokens: int, rows: int) -> Tensor:
    """A teacher's LM head [V, d] with the `rows` of the student's: those behind its first `tokens` are zeros."""
    fitted = head.new_zeros(rows, head.shape[1])
    fitted[:tokens] = head[:tokens]
    return fitted


def first_difference(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """The first token, by id, that does not mean the same to both, in words; empty if all do, mask tokens left out."""
    masks = {tokenizer.mask_token, other.mask_token}
    ours, theirs = ({t: i for t, i in each.get_vocab().items() if t not in masks} for each in (tokenizer, other))
    different = {token: number for token, number in (theirs | ours).items() if ours.get(token) != theirs.get(token)}
    if not different:
        return ""
    token = min(different, key=different.__getitem__)
    return f"{token!r} is {_id_in(ours, token)} in the one and {_id_in(theirs, token)} in the other"


def _id_in(vocabulary: dict[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "no token"


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
    folder = Path(model_folder(path))
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    tensors = stored_tensors(folder)
    name = head_of(tensors)
    with safe_open(tensors[name].file, framework="pt") as file:
        return file.get_tensor(name)
