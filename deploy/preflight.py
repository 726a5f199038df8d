"""Everything that can be checked before a process starts. Each error names the field, the value and the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from common.config.data import DataConfig
from common.config.errors import ConfigError
from common.config.fingerprint import evaluation_fingerprint, fingerprint, input_paths
from common.config.run import RunConfig
from common.config.shown import shown
from common.datasets.errors import PromptError
from common.grid import grid_ceil, grid_floor
from common.prompts import Prompt, PromptSet, load_problems, load_prompts
from deploy.checkpoints import FINAL, Checkpoints, RunState, copy_target
from deploy.dashboard.process import free_port, read_token
from deploy.data_fingerprint import data_fingerprints
from deploy.held_out import HeldOutPrompts, kept_prompts
from deploy.model_checks import check_model_folder, check_models
from deploy.placement import (
    Placement,
    check_memory,
    check_resources,
    disk_bytes,
    learner_copy_bytes,
    learner_copy_fits,
    object_store_mib,
    on_cluster,
    plan,
)
from deploy.run_folder import anchor_of, check_run_dir

if TYPE_CHECKING:  # transformers and torch take seconds
    from common.conversion import Conversion


@dataclass(frozen=True)
class PreparedRun:
    """What the checks before a start have found and the run goes on with, so that nothing is read or planned twice.

    `positions`: tokens that both models can read. `object_store_mib`: None on a cluster, which has its own. `held_out`:
    None where no prompts are held out. `checkpoint`: folder and counters from which the run goes on; None: from the
    start. `checkpoints`: of this run, which know its data. `learner_copy`: ranks can be restarted from copies of their
    state. `warnings`: what its user should hear when it starts.
    """

    config: RunConfig
    placement: Placement
    object_store_mib: int | None
    tokenizer: Any
    positions: int
    prompts: PromptSet
    problems: list[Prompt]
    held_out: HeldOutPrompts | None
    checkpoints: Checkpoints
    checkpoint: tuple[Path, RunState] | None
    learner_copy: bool
    warnings: list[str]

    @property
    def trained(self) -> bool:
        """Whether the training is finished, so that only its evaluation is left."""
        return self.checkpoint is not None and self.checkpoint[0].name == FINAL

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.problems or self.held_out)


def prepare(
    config: RunConfig, overwrite: bool = False, resume: bool = False, accept_changed_data: bool = False
) -> PreparedRun:
    """All checks of a run, and what they found.

    Raises:
        ConfigError: the run cannot start as configured.
    """
    check_run_dir(config, overwrite, resume)
    check_model_folder("model.path", config.model.path)
    for field, path in config.teacher_paths.items():
        check_model_folder(field, path)
    placement = plan(config)
    check_processes(config, placement)
    if config.pipeline.copy_checkpoints_to:
        copy_target(config.pipeline.copy_checkpoints_to)
    if config.dashboard.enabled:
        read_token(config.dashboard.token_file)
        free_port(config.dashboard.host, config.dashboard.port)
    models = check_models(config)
    tokenizer, positions = models.student.tokenizer, models.positions
    kept = kept_prompts(config.run_dir) if resume and config.evaluation.held_out_prompts else None
    prompts, problems = read_prompts(config, tokenizer, kept)
    check_domains(config, prompts, problems)
    _check_lengths(config, prompts, problems, positions)
    asked = {"data.prompts": [*prompts.prompts, *prompts.held_out], "evaluation.problems": problems}
    _check_rows(asked, models.student)
    prompts = replace(
        prompts,
        responses=read_responses(config, models.student, prompts.prompts),
        trajectories=read_trajectories(config, models.student, prompts.prompts),
    )
    _check_batch(config, len(prompts.prompts))
    data = data_fingerprints(config, prompts)
    checkpoints = Checkpoints(config, data)
    check_disk(config, placement)
    checkpoint = checkpoints.latest(accept_changed_data) if resume else None
    if checkpoint and checkpoint[0].name != FINAL:
        _check_anchor(config, checkpoint[1])
    copied = config.recovery.learner_copy and (
        on_cluster(config) or learner_copy_fits(config, placement, psutil.virtual_memory().total)
    )
    return PreparedRun(
        config=config,
        placement=placement,
        object_store_mib=None if on_cluster(config) else object_store_mib(config, placement),
        tokenizer=tokenizer,
        positions=positions,
        prompts=prompts,
        problems=problems,
        held_out=_held_out(config, prompts, data),
        checkpoints=checkpoints,
        checkpoint=checkpoint,
        learner_copy=copied,
        warnings=[
            *models.student.notes,
            *_idle_teachers(config, prompts),
            *checkpoints.damaged,
            *_not_copied(config, placement, copied),
        ],
    )


def _not_copied(config: RunConfig, placement: Placement, copied: bool) -> list[str]:
    if copied or not config.recovery.learner_copy:
        return []
    needed = learner_copy_bytes(placement) / 2**30
    return [
        f"recovery.learner_copy is off: the copies of the learner's state ({needed:,.1f} GiB) do not fit in this "
        "machine's memory beside the run; if a rank fails, the run ends, and goes on from its newest checkpoint"
    ]


def _held_out(config: RunConfig, prompts: PromptSet, data: dict[str, str]) -> HeldOutPrompts | None:
    if not prompts.held_out:
        return None
    limit = config.evaluation.held_out_tokens
    teachers = " ".join(data[field] for field in config.teacher_paths)
    return HeldOutPrompts(prompts.held_out, config.run_dir, teachers, limit)


def _check_anchor(config: RunConfig, state: RunState) -> None:
    """Refuse to go on without the student that teaches there."""
    anchor = anchor_of(config, state.block_size or config.block_size)
    if anchor and not (anchor / "config.json").is_file():
        raise ConfigError(
            f"--resume: {str(anchor)!r}, the student of the smaller blocks that teaches from then on "
            "(block_growth.anchor), is missing; bring it back, or start another run with --name"
        )


def check_disk(config: RunConfig, placement: Placement) -> None:
    """Refuse a disk that does not hold the run's checkpoints; those of an earlier part of the run, or of one that is
    replaced, make room.

    Raises:
        ConfigError: names both numbers of bytes, and the remedy.
    """
    folder = config.run_dir.absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    free += sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
    needed, kept = disk_bytes(config, placement), config.pipeline.keep_checkpoints
    if needed <= free:
        return
    one = placement.checkpoint["optimizer"] + placement.checkpoint["model"]
    often = (
        f", {kept + 1} of {one / 2**30:,.2f} GiB with the optimizer and the final model: lower "
        f"pipeline.keep_checkpoints ({kept})"
        if config.pipeline.checkpoints_while_training
        else ": the final model"
    )
    raise ConfigError(
        f"output_dir: {str(config.output_dir)!r} has {free / 2**30:,.2f} GiB free, the run's checkpoints need "
        f"{needed / 2**30:,.2f} GiB{often}, free space there, or choose another output_dir"
    )


def finished_summary(config: RunConfig) -> dict[str, Any]:
    """`summary.json` of the run's folder if this very config was trained and evaluated there, on data and models of the
    same paths; else an empty one.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = config.run_dir / "summary.json"
    if not file.is_file():
        return {}
    try:
        summary = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"name: {str(file)!r} cannot be read ({error}); remove it, and --resume auto makes what is missing again"
        ) from error
    own = identity(config)
    return summary if {name: summary.get(name) for name in own} == own else {}


def identity(config: RunConfig) -> dict[str, Any]:
    """What a summary says of the config that it belongs to."""
    return {
        "config_fingerprint": fingerprint(config),
        "evaluation_fingerprint": evaluation_fingerprint(config),
        "inputs": input_paths(config),
    }


def check_processes(config: RunConfig, placement: Placement) -> None:
    """Refuse processes that cannot run here: missing CPUs, GPUs, teacher engine or Weights & Biases client."""
    if config.wandb.enabled and find_spec("wandb") is None:
        raise ConfigError("wandb.enabled: 'wandb' is not installed; install opdlm[wandb], or use --wandb.enabled false")
    if config.learner.ranks > 1 and 0 < config.learner.resources.gpus < 1:
        raise ConfigError(
            f"learner.resources.gpus: {config.learner.resources.gpus:g} would put several ranks on one GPU, which NCCL "
            "refuses; use 1, or learner.ranks 1"
        )
    if on_cluster(config):
        return  # another machine's; checked when connected
    backends = {teacher.backend for teacher in config.teacher.pools.values()}
    if config.target_kind != "none" and "vllm" in backends and find_spec("vllm") is None:
        raise ConfigError(
            "teacher.backend: 'vllm' is not installed; install opdlm[cpu] or opdlm[cuda], "
            "or use --teacher.backend transformers"
        )
    _check_torch(placement)
    check_resources(placement, config.ray.num_cpus or os.cpu_count() or 1, _local_gpus() if placement.gpus else 0)
    check_memory(config, placement, psutil.virtual_memory().total)


def read_prompts(
    config: RunConfig, tokenizer: Any, held_out: list[Prompt] | None = None
) -> tuple[PromptSet, list[Prompt]]:
    """The run's prompts, and its held-out problems in the order of their file; the notes are of both.

    `held_out`: the prompts that an earlier part of the run has held out.
    """
    try:
        prompts = load_prompts(config.data, tokenizer, config.seed, held_out or config.evaluation.held_out_prompts)
    except PromptError as error:
        raise ConfigError(f"data.prompts: {error}") from error
    if not config.evaluation.problems:
        return prompts, []
    where = {
        "prompts": config.evaluation.problems,
        "split": config.evaluation.split,
        "subset": config.evaluation.subset,
    }
    data = config.data.model_copy(update=where)
    try:
        problems = read_problems("evaluation.problems", data, tokenizer, config.evaluation.count)
    except ConfigError as error:
        raise ConfigError(re.sub(r"data\.(split|subset)\b", r"evaluation.\1", str(error))) from error
    left_out = [f"{count} problems dropped: {reason}" for reason, count in problems.dropped.items()]
    return replace(prompts, notes=(*prompts.notes, *problems.notes, *left_out)), problems.prompts


def read_responses(config: RunConfig, student: Conversion, prompts: list[Prompt]) -> dict[str, list[Any]]:
    """The offline responses by question; empty where objective.source needs none."""
    if not config.objective.needs_responses:
        return {}
    from common.responses import load_responses

    try:
        return load_responses(config.data, student.tokenizer, prompts, student.end_tokens)
    except PromptError as error:
        raise ConfigError(f"data.responses: {error}") from error


def read_trajectories(config: RunConfig, student: Conversion, prompts: list[Prompt]) -> dict[str, list[Any]]:
    """The rollouts of an earlier run by question; empty where objective.source needs none."""
    if not config.objective.needs_trajectories:
        return {}
    from common.responses import load_trajectories
    from common.vocabulary import tokenizer_fingerprint

    assert config.data.trajectories
    try:
        return load_trajectories(
            config.data.trajectories,
            prompts,
            int(student.config.vocab_size),
            block_size=config.block_size,
            mask_token_id=student.config.mask_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint(student.tokenizer),
        )
    except PromptError as error:
        raise ConfigError(f"data.trajectories: {error}") from error


def read_problems(field: str, data: DataConfig, tokenizer: Any, count: int) -> PromptSet:
    """The first `count` problems of a source, each with an answer."""
    try:
        return load_problems(data, tokenizer, count)
    except PromptError as error:
        raise ConfigError(f"{field}: {error}") from error


def _check_batch(config: RunConfig, prompts: int) -> None:
    """Refuse a rollout batch that can never be filled: it, and all that is counted in batches, would mean another."""
    if config.rollout.prompts_per_batch > prompts:
        fields = ["data.prompts", "data.limit", "data.epochs"]
        fields += ["evaluation.held_out_prompts"] if config.evaluation.held_out_prompts else []
        raise ConfigError(
            f"rollout.prompts_per_batch: {config.rollout.prompts_per_batch} is more than the {prompts} prompts to "
            f"train on ({', '.join(fields)}); use {prompts} or less"
        )


def check_domains(config: RunConfig, prompts: PromptSet, problems: list[Prompt]) -> None:
    """Refuse prompts, or problems that the teacher is to solve, that no teacher is for."""
    asked = [("data.prompts", [*prompts.prompts, *prompts.held_out])]
    if config.evaluation.teacher:
        asked.append(("evaluation.problems", problems))
    for field, rows in asked:
        for prompt in rows:
            if config.teacher.serving(prompt.domain) is None:
                of = f"domain {shown(prompt.domain)}" if prompt.domain else "no domain"
                known = ", ".join(domain for t in config.teacher.pools.values() for domain in t.domains)
                raise ConfigError(
                    f"teacher.domains: {shown(prompt.question)} of {field} has {of}, and the teachers are for {known}; "
                    "add it to one's domains, or leave the domains of one empty: it is for all others"
                )


def _idle_teachers(config: RunConfig, prompts: PromptSet) -> list[str]:
    """What is said of domains of teachers that no prompt has."""
    asked = {prompt.domain for prompt in prompts.prompts}
    return [
        f"teacher.{place}domains: no prompt to train on has the domain {shown(domain)}"
        for place, teacher in config.teacher.pools.items()
        for domain in teacher.domains
        if domain not in asked
    ]


def _check_lengths(config: RunConfig, prompts: PromptSet, problems: list[Prompt], limit: int) -> None:
    parts = [("data.prompts", prompts.prompts, "curriculum.max_tokens", config.curriculum.max_tokens)]
    if prompts.held_out:
        response = config.evaluation.held_out_tokens
        parts.append(("data.prompts", prompts.held_out, "evaluation.held_out_tokens", response))
    if problems:
        response = config.evaluation.max_new_tokens
        parts.append(("evaluation.problems", problems, "evaluation.max_new_tokens", response))
    for field, rows, response_field, response in parts:
        longest = max(len(p.ids) for p in rows)
        block_size = config.block_sizes[-1]
        needed = grid_ceil(longest + response, block_size)
        if needed > limit:
            raise ConfigError(
                f"{response_field}: {response} after the longest prompt of {field} ({longest} tokens) needs {needed} "
                f"positions, the models have {limit}; lower {response_field} to "
                f"{grid_floor(limit, block_size) - longest} or less, or drop long prompts with data.max_prompt_tokens"
            )


def _check_rows(prompts: dict[str, list[Prompt]], student: Conversion) -> None:
    """Some tokenizers know tokens (of images, say) for which the embedding of a text model has no row."""
    for field, each in prompts.items():
        for prompt in each:
            if beyond := [int(number) for number in prompt.ids if number >= student.config.vocab_size]:
                token = student.tokenizer.convert_ids_to_tokens(beyond[0])
                raise ConfigError(
                    f"{field}: {shown(prompt.question)} holds the token {token!r}, for which the model has no row in "
                    "its embedding; remove the prompt"
                )


def _check_torch(placement: Placement) -> None:
    """Refuse GPUs on this machine with a torch that cannot use any."""
    import torch

    if placement.gpus and not torch.version.cuda:
        raise ConfigError(
            f"the run asks for {placement.gpus:g} GPUs, but torch {torch.__version__} is a build without CUDA; install "
            "opdlm[cuda] with a CUDA build of torch, or set rollout, teacher and learner.resources.gpus to 0"
        )


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()
