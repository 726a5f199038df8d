"""What is checked of models before a process starts. Each error names the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.adapter_files import read_adapter
from common.config.adapter import OF_ATTENTION
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.gguf_files import model_folder
from common.model_files import (
    ModelError,
    check_fetched,
    check_plain,
    check_rope,
    check_sizes,
    check_unquantised,
    read_json,
    stored_tensors,
    strays,
)
from deploy.adapter_checks import check_fits

if TYPE_CHECKING:  # transformers and torch take seconds
    from common.conversion import Conversion


def check_model_folder(field: str, path: str) -> None:
    """Refuse a folder that is missing, holds no causal LM, or one whose weights are not whole; a hub id passes.

    Only headers are read, and neither torch nor transformers is loaded; but a GGUF file is unpacked first.

    Raises:
        ConfigError: names the field, the path and the remedy.
    """
    with model_errors(field, path):
        folder = Path(model_folder(path))
    if folder.is_file():
        raise ConfigError(f"{field}: {path!r} is a file; give the folder of a Hugging Face model, or a .gguf file")
    if not folder.is_dir():
        if looks_local(path):
            raise ConfigError(f"{field}: folder {path!r} does not exist; give a Hugging Face model folder or a hub id")
        return
    with model_errors(field, path):
        check_fetched(folder)
    config = model_json(field, path)
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForCausalLM") for name in architectures):
        raise ConfigError(
            f"{field}: {path!r} is {', '.join(architectures) or 'of no stated architecture'}, not a causal LM "
            "(an architecture that ends in ForCausalLM); choose another model"
        )
    with model_errors(field, path):
        check_unquantised(config)
        check_sizes(config)
        check_rope(config)
        check_plain(stored_tensors(folder))


@dataclass(frozen=True)
class StudentPath:
    """Where a student is: `field` says which option names its `folder`, and `base` is the model of an adapter there, in
    place of the one that it names."""

    folder: str
    base: str | None = None
    field: str = "MODEL"

    @classmethod
    def of(cls, model: str, adapter: str | None) -> StudentPath:
        """Of a command's MODEL and --adapter."""
        return cls(model) if adapter is None else cls(adapter, model, "--adapter")


def check_student_folder(field: str, path: str, base: str | None = None) -> None:
    """Refuse a model that is no converted student: it would not know its mask token and block size. The folder may hold
    an adapter, of the model at `base` or of the one that it names; that is checked too, and that they fit."""
    with model_errors(field, path):
        adapter = read_adapter(path, base)
    named = "MODEL" if base else field if adapter is None else f"{field}: base of {path!r}"
    check_model_folder(named, adapter.base if adapter else path)
    if adapter and Path(model_folder(adapter.base)).is_dir():
        with model_errors(field, path):
            check_fits(adapter)
    if Path(path).is_dir() and model_json(field, path).get("mask_token_id") is None:
        raise ConfigError(
            f"{field}: {path!r} is an autoregressive model, not a student; convert it first: opdlm convert {path} OUT"
        )


def verifier_of(verify: str, at: StudentPath, rules: Iterable[str]) -> str | None:
    """Where the original is that verifies under the speculative rule, of --verify; None: the student itself does.

    Raises:
        ConfigError: the student cannot verify itself; there is no such original, or its tokens are others.
    """
    if verify == "self":
        check_verifies(at.field, at.folder, rules)
        return None
    if "speculative" not in rules:
        raise ConfigError(f"--verify: {verify!r} is for the speculative rule; add --rule speculative, or leave it out")
    if verify == "base":
        with model_errors(at.field, at.folder):
            adapter = read_adapter(at.folder, at.base)
        if adapter is None:
            raise ConfigError(
                f"--verify: 'base' is the model of an adapter, and {at.folder!r} is none; give the original's folder"
            )
        return adapter.base
    check_model_folder("--verify", verify)
    from common.student import load_tokenizer
    from common.vocabulary import first_difference

    with model_errors("--verify", verify):
        theirs = load_tokenizer(verify)
    with model_errors(at.field, at.folder):
        ours = load_tokenizer(at.folder)
    there = load_student_config("--verify", verify).max_position_embeddings
    here = load_student_config(at.field, at.folder).max_position_embeddings
    if there < here:
        raise ConfigError(f"--verify: {verify!r} has {there} positions and the student {here}; give its original")
    if different := first_difference(ours, theirs):
        raise ConfigError(f"--verify: {verify!r} has other tokens than the student ({different}); give its original")
    return verify


def check_verifies(field: str, path: str, rules: Iterable[str]) -> None:
    """Refuse the speculative rule for a student whose causal reading is not that of its cache."""
    if "speculative" not in rules or not Path(path).is_dir():
        return
    if model_json(field, path).get("attention_context", "block") != "causal":
        raise ConfigError(
            f"--rule: 'speculative' needs a student with attention_context 'causal', that of {path!r} is 'block'; "
            "let the original verify (--verify of opdlm generate, eval and serve), train one with attention.context "
            "causal, or choose another rule"
        )


@contextmanager
def model_errors(field: str, path: str) -> Iterator[None]:
    """Errors about a model's files, with the field and the path that they stand for."""
    try:
        yield
    except ModelError as error:
        raise ConfigError(f"{field}: {path!r} {error}") from error


def model_json(field: str, path: str) -> dict[str, Any]:
    """The config.json of a model folder."""
    with model_errors(field, path):
        file = Path(model_folder(path)) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{field}: {path!r} has no config.json; give the folder of a Hugging Face causal LM")
    with model_errors(field, path):
        return read_json(file)


def looks_local(path: str) -> bool:
    """Whether a model path means a folder and not a hub id (`organisation/name`)."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


@dataclass(frozen=True)
class CheckedModels:
    """The student that a run starts with, and the number of positions that both models can read."""

    student: Conversion
    positions: int


def check_models(config: RunConfig) -> CheckedModels:
    """Refuse models that the run could not load, train together or save.

    Raises:
        ConfigError: names the field, the path and the remedy.
    """
    from common.conversion import checked, counted_tokens, student_of
    from common.vocabulary import first_difference

    path = config.model.path
    teachers = {}
    for (field, teacher_path), own in zip(config.teacher_paths.items(), config.by_teacher, strict=True):
        _check_strays(field, own)
        if teacher_path != path:
            teachers[field] = teacher_path, *_check_teacher(field, own)
    with model_errors("model.path", path):
        student = checked(path, student_of(config))
    _check_experts(config, student.config)
    _check_targets(config, student.config)
    _check_layers(config, student.config, teachers["teacher.path"][1] if "teacher.path" in teachers else student.config)
    positions = student.config.max_position_embeddings
    for (field, teacher_path), own in zip(config.teacher_paths.items(), config.by_teacher, strict=True):
        if own.teacher.reads == "state":
            _check_reads_states(field, teacher_path, student.config.mask_token_id)
    for field, (teacher_path, teacher_config, teacher_tokenizer) in teachers.items():
        if different := first_difference(student.tokenizer, teacher_tokenizer):
            raise ConfigError(
                f"model.path {path!r} and {field} {teacher_path!r} have different tokenizers ({different}); token ids "
                "must mean the same to both: choose models of one family"
            )
        widths = student.config.hidden_size, teacher_config.hidden_size
        if config.objective.terms.alignment and widths[0] != widths[1]:
            raise ConfigError(
                f"objective.terms.alignment: hidden states of width {widths[0]} (model.path {path!r}) cannot be "
                f"aligned with those of width {widths[1]} ({field} {teacher_path!r}); set it to 0, or choose another "
                "teacher"
            )
        rows = student.config.vocab_size, teacher_config.vocab_size
        if rows[0] != rows[1]:
            tokens = counted_tokens(student, teacher_path)
            note = (
                f"the LM head of model.path has {rows[0]} rows and that of {field} {rows[1]}; the teacher's "
                f"distribution is over its {tokens} tokens"
            )
            student = replace(student, notes=(*student.notes, note))
        positions = min(positions, teacher_config.max_position_embeddings)
    return CheckedModels(student, positions)


def _check_layers(config: RunConfig, student: Any, teacher: Any) -> None:
    """Refuse layers to align that one of the models does not have."""
    terms = config.objective.terms
    if not terms.aligns_layers:
        return
    count = student.num_hidden_layers + 1
    if teacher.num_hidden_layers + 1 != count:
        raise ConfigError(
            f"objective.terms.alignment_of: the student has {student.num_hidden_layers} layers and teacher.path "
            f"{config.teacher_path!r} {teacher.num_hidden_layers}; set it to 'final'"
        )
    if beyond := [layer for layer in terms.aligned(count) if layer >= count]:
        raise ConfigError(
            f"objective.terms.alignment_layers: {beyond[0]} is none of the layers, which are 0 (the embedding) to "
            f"{count - 1} (the final hidden state); take it out"
        )


def _check_experts(config: RunConfig, student: Any) -> None:
    """Refuse what a model with experts cannot do: CUDA graphs repeat one routing, and there are no kernels for it."""
    from common.student import has_experts

    if not has_experts(student):
        return
    rollout, learner = config.rollout, config.learner
    for field, on in (
        ("rollout.cuda_graphs", rollout.cuda_graphs and rollout.resources.gpus),
        ("rollout.compile", rollout.compile and rollout.resources.gpus),
        ("learner.compile", learner.compile and learner.resources.gpus),
        ("learner.liger_kernels", learner.liger_kernels),
    ):
        if on:
            raise ConfigError(
                f"{field}: model.path {config.model.path!r} (model_type {student.model_type!r}) routes each token to "
                f"experts by its value, which captured or fused passes do not follow; set {field} to false"
            )


def _check_targets(config: RunConfig, student: Any) -> None:
    """Refuse adapters of a plain MLP where there are experts."""
    from common.student import has_experts

    others = [target for target in config.adapter.targets if target not in OF_ATTENTION]
    if config.adapter.rank and others and has_experts(student):
        raise ConfigError(
            f"adapter.targets: model.path {config.model.path!r} has experts, and no linear layer {others[0]!r}; set "
            f"adapter.targets to {list(OF_ATTENTION)}, or some of these"
        )


def _check_reads_states(field: str, path: str, mask_token_id: int) -> None:
    """Refuse a teacher that knows no masks, or other ones than the student."""
    check_student_folder(field, path)
    own = load_student_config(field, path)
    if own.mask_token_id != mask_token_id:
        raise ConfigError(
            f"{field}: the mask token of {path!r} is {own.mask_token_id} and the student's {mask_token_id}; both read "
            "the same states: set model.mask_token to the teacher's"
        )


def load_student_config(field: str, path: str) -> Any:
    """The transformers config of a student, or of another model."""
    from common.student import load_config

    with model_errors(field, path):
        return load_config(path)


def _check_strays(field: str, config: RunConfig) -> None:
    """vLLM reads every weights file of a folder without an index."""
    folder = Path(model_folder(config.teacher_path))
    if config.target_kind != "none" and config.teacher.backend == "vllm" and folder.is_dir() and strays(folder):
        raise ConfigError(
            f"{field}: {config.teacher_path!r} holds {strays(folder)[0]} beside its weights, and vLLM would read "
            "it too; remove it, or use --teacher.backend transformers"
        )


def _check_teacher(field: str, config: RunConfig) -> tuple[Any, Any]:
    """Config and tokenizer of a teacher that is another model than the student starts from."""
    from common.conversion import check_weights
    from common.student import check_family, load_config, load_tokenizer
    from common.vocabulary import check_tokenizer

    path = config.teacher_path
    with model_errors(field, path):
        teacher, tokenizer = load_config(path), load_tokenizer(path)
        check_weights(path)
        check_tokenizer(tokenizer, teacher.vocab_size)
        if config.target_kind == "hidden":  # the LM head is applied here; other targets come from the engine
            check_family(teacher)
    return teacher, tokenizer
