"""Evaluation of one student under many decoding settings, with its autoregressive (AR) teacher beside it.

A metric comes with mean and standard deviation. With temperature > 0 each setting is decoded once per seed, and the
deviation is that over seeds (n - 1 in the denominator). Greedy decoding gives the same tokens for every seed, so it
is decoded once, and the deviation is over the choice of problems: 1,000 bootstrap resamples. The same holds for a
single seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.evaluation.autoregressive import evaluate_autoregressive, load_autoregressive
from actors.evaluation.evaluation import Evaluation, evaluate_shard
from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.errors import ConfigError
from common.config.run import (
    AnswerFormat,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    StaticUnmasking,
    Unmasking,
)
from common.prompts import Prompt
from deploy.model_checks import model_errors
from deploy.versions import installed_versions

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Setting:
    """One row: an unmasking rule at a block size, or neither for autoregressive decoding."""

    unmasking: Unmasking | None = None
    block_size: int | None = None

    @property
    def decoding(self) -> str:
        """The rule with its parameter, as in `dynamic 0.9`."""
        match self.unmasking:
            case DynamicUnmasking(threshold=threshold):
                return f"dynamic {threshold:g}"
            case StaticUnmasking(steps_per_block=steps):
                return f"static {(self.block_size or 1) // steps if steps and self.block_size else 1}"
            case SequentialUnmasking(tokens_per_step=tokens):
                return f"sequential {tokens}"
            case EntropyBoundUnmasking(bound_nats=bound):
                return f"entropy {bound:g}"
        return "AR"


def settings_of(
    rules: list[str], thresholds: list[float], tokens_per_step: list[int], bounds: list[float], block_sizes: list[int]
) -> list[Setting]:
    """Every rule with every value of its own parameter at every block size, without repeats.

    Raises:
        ConfigError: a static rule's tokens per step do not divide a block size.
    """
    settings = []
    for block_size in block_sizes:
        for rule in rules:
            if rule == "dynamic":
                unmaskings: list[Unmasking] = [DynamicUnmasking(threshold=t) for t in thresholds]
            elif rule == "entropy_bound":
                unmaskings = [EntropyBoundUnmasking(bound_nats=b) for b in bounds]
            elif rule == "sequential":
                unmaskings = [SequentialUnmasking(tokens_per_step=k) for k in tokens_per_step]
            else:
                unmaskings = [_static(k, block_size) for k in tokens_per_step]
            settings += [Setting(unmasking, block_size) for unmasking in unmaskings]
    return list(dict.fromkeys(settings))


def _static(tokens_per_step: int, block_size: int) -> StaticUnmasking:
    if block_size % tokens_per_step:
        raise ConfigError(
            f"--tokens-per-step: {tokens_per_step} does not divide block size {block_size}, as the static rule needs; "
            "choose divisors of every --block-size"
        )
    return StaticUnmasking(steps_per_block=block_size // tokens_per_step)


@dataclass
class Row:
    """Metrics of one setting; `std` lacks those without a deviation (speed of a single run)."""

    model: Literal["student", "teacher"]
    path: str
    decoding: str
    block_size: int | None
    unmasking: dict[str, Any] | None
    spread: Literal["seeds", "problems"]
    mean: dict[str, float]
    std: dict[str, float]
    runs: list[dict[str, float]]


@dataclass(frozen=True)
class Sweep:
    """What all settings have in common."""

    problems: list[Prompt]
    max_new_tokens: int
    temperature: float = 0.0
    seeds: int = 1
    slots: int = 64
    dtype: str = "float32"
    answer_format: AnswerFormat = "answer_line"

    @property
    def run_seeds(self) -> range:
        """Greedy decoding does not depend on the seed, so it runs once."""
        return range(self.seeds if self.temperature > 0 else 1)

    def student_rows(self, field: str, path: str, settings: list[Setting]) -> Iterator[Row]:
        """One row per setting as it is done; the model, which the option `field` names, is loaded once."""
        with model_errors(field, path):
            model, tokenizer = load_student(path, self.dtype)
        sampler = sampler_of(model, tokenizer, block_size=None, slots=self.slots)
        for setting in settings:
            assert setting.unmasking and setting.block_size
            sampler.set_block_size(setting.block_size)
            decoding = Decoding(setting.unmasking, self.temperature)
            if sampler.on_cuda:  # capture the graphs before anything is timed
                self._decode(sampler, tokenizer, self.problems[: self.slots], decoding)
            runs = []
            for seed in self.run_seeds:
                sampler.seed = seed
                runs.append(self._decode(sampler, tokenizer, self.problems, decoding))
            yield row_of("student", path, setting, runs)

    def _decode(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, problems: list[Prompt], decoding: Decoding
    ) -> Evaluation:
        return evaluate_shard(sampler, tokenizer, problems, decoding, self.max_new_tokens, self.answer_format)

    def teacher_row(self, field: str, path: str, ends: list[int] | None = None) -> Row:
        """The same problems, limit and temperature with one token a forward; `ends` in place of its own end tokens."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: PreTrainedModel
        with model_errors(field, path):
            model, tokenizer = load_autoregressive(path, device, self.dtype, ends)
        runs = [
            evaluate_autoregressive(
                model,
                tokenizer,
                self.problems,
                self.max_new_tokens,
                temperature=self.temperature,
                seed=seed,
                batch_size=self.slots,
                answer_format=self.answer_format,
            )
            for seed in self.run_seeds
        ]
        return row_of("teacher", path, Setting(), runs)

    def report(self, problems_path: str, rows: list[Row]) -> dict[str, Any]:
        """The content of the results' JSON file."""
        return {
            "format_version": FORMAT_VERSION,
            "problems": {"path": problems_path, "count": len(self.problems)},
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seeds": list(self.run_seeds),
            "answer_format": self.answer_format,
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "versions": installed_versions(),
            "rows": [asdict(row) for row in rows],
        }


def row_of(model: Literal["student", "teacher"], path: str, setting: Setting, runs: list[Evaluation]) -> Row:
    """Mean and standard deviation over the runs of one setting, or over problems where there is one run."""
    metrics = [run.metrics() for run in runs]
    mean = {name: statistics.fmean(f[name] for f in metrics) for name in metrics[0]}
    if len(runs) > 1:
        varying = [name for name in mean if name != "problems"]
        std = {name: statistics.stdev(f[name] for f in metrics) for name in varying}
    else:
        std = runs[0].spread_over_problems()
    return Row(
        model=model,
        path=path,
        decoding=setting.decoding,
        block_size=setting.block_size,
        unmasking=setting.unmasking.model_dump() if setting.unmasking else None,
        spread="seeds" if len(runs) > 1 else "problems",
        mean=mean,
        std=std,
        runs=metrics,
    )
