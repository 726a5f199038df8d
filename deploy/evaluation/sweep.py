"""What a sweep runs: suites, models and settings; and the responses of each, made or found on the disk.

With temperature > 0 each setting is decoded once per seed. Greedy decoding gives the same tokens for every seed, so it
is decoded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors.evaluation.responses import Response
from actors.evaluation.worker import Answered, Chunk, ModelSpec
from actors.sampler.request import Request
from common.config.errors import ConfigError
from common.config.unmasking import (
    AdaptiveUnmasking,
    DynamicUnmasking,
    EntropyBoundUnmasking,
    SequentialUnmasking,
    SpeculativeUnmasking,
    StaticUnmasking,
    Unmasking,
)
from deploy.data_fingerprint import of_files
from deploy.evaluation.decoding_options import adaptive
from deploy.evaluation.parts import Parts
from deploy.evaluation.problems import SuiteProblems
from deploy.evaluation.workers import Workers
from deploy.model_checks import model_errors

_CHUNK = 64  # requests of one part


@dataclass(frozen=True)
class Setting:
    """One row: an unmasking rule at a block size, or neither for autoregressive decoding."""

    unmasking: Unmasking | None = None
    block_size: int | None = None

    @property
    def decoding(self) -> str:
        """The rule with its parameter, as in `dynamic 0.9`."""
        match self.unmasking:
            case DynamicUnmasking(threshold=threshold, revise=revise):
                return f"dynamic {threshold:g}" + (f", revised {revise:g}" if revise else "")
            case StaticUnmasking(steps_per_block=steps):
                return f"static {(self.block_size or 1) // steps if steps and self.block_size else 1}"
            case SequentialUnmasking(tokens_per_step=tokens):
                return f"sequential {tokens}"
            case EntropyBoundUnmasking(bound_nats=bound):
                return f"entropy {bound:g}"
            case AdaptiveUnmasking(lower=lower, upper=upper):
                return f"adaptive {lower:g}-{upper:g}"
            case SpeculativeUnmasking(draft_rounds=rounds, threshold=threshold, verify=verify):
                by = " by original" if verify == "base" else ""
                return f"speculative {rounds}" + (f" {threshold:g}" if rounds > 1 else "") + by
        return "AR"


def settings_of(
    rules: list[str],
    thresholds: list[float],
    tokens_per_step: list[int],
    bounds: list[float],
    lowers: list[float],
    block_sizes: list[int],
    draft_rounds: list[int] | None = None,
    revisions: list[float] | None = None,
    verify: Literal["self", "base"] = "self",
) -> list[Setting]:
    """Every rule with every value of its own parameter at every block size, without repeats; the adaptive rule with
    every one of `lowers` under every threshold, the dynamic one with every one of `revisions`. `verify` is of the
    speculative rule.

    Raises:
        ConfigError: a static rule's tokens per step do not divide a block size, or a lower bound is above a threshold.
    """
    settings = []
    for block_size in block_sizes:
        for rule in rules:
            if rule == "dynamic":
                unmaskings: list[Unmasking] = [
                    DynamicUnmasking(threshold=t, revise=r) for t in thresholds for r in revisions or [0.0]
                ]
            elif rule == "entropy_bound":
                unmaskings = [EntropyBoundUnmasking(bound_nats=b) for b in bounds]
            elif rule == "adaptive":
                unmaskings = [adaptive(lower, upper) for lower in lowers for upper in thresholds]
            elif rule == "speculative":
                unmaskings = [
                    SpeculativeUnmasking(verify=verify, draft_rounds=n, threshold=t)
                    for n in draft_rounds or [1]
                    for t in (thresholds if n > 1 else [SpeculativeUnmasking().threshold])  # one round needs none
                ]
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


@dataclass(frozen=True)
class Progress:
    """What is told while it works: `begin` says what and of how many steps, `advance` that some are done."""

    begin: Callable[[str, int], None] = lambda *_: None
    advance: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class Run:
    """All responses of one setting to one suite with one seed, in the order of the requests; `seconds` of decoding are
    added up over processes."""

    responses: list[Response]
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """What all runs have in common. `positions`: tokens of a prompt with its response; `max_new_tokens` None: each
    suite's own limit."""

    suites: list[SuiteProblems]
    positions: int
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seeds: int = 1
    samples: int = 1
    slots: int = 64
    dtype: str = "float32"

    @property
    def run_seeds(self) -> range:
        """Greedy decoding does not depend on the seed, so it runs once."""
        return range(self.seeds if self.temperature > 0 else 1)

    def limit(self, suite: SuiteProblems) -> int:
        return self.max_new_tokens or suite.suite.max_new_tokens

    def requests(self, suite: SuiteProblems) -> list[Request]:
        """`samples` for each problem; a response ends at the limit, or where the model's positions do."""
        return [
            Request(p.ordinal, sample, p.ids, min(self.limit(suite), self.positions - len(p.ids)), stop=suite.stop)
            for p in suite.problems
            for sample in range(self.samples)
        ]


class SweptModel:
    """One model of a sweep. It is loaded into the workers when the first of its responses is missing on the disk.

    Life cycle: constructed, then `run` for each suite and setting; another model may be loaded only after that.
    """

    def __init__(
        self, field: str, spec: ModelSpec, sweep: Sweep, workers: Workers, parts: Parts, progress: Progress
    ) -> None:
        """`field`: the option that names the model."""
        self.field = field
        self.spec = spec
        self.sweep = sweep
        self.workers = workers
        self.parts = parts
        self.progress = progress
        paths = [path for path in (spec.path, spec.base, spec.verifier) if path]
        self._content = [of_files(Path(path)) if Path(path).is_dir() else path for path in paths]
        self._loaded = False

    def run(self, suite: SuiteProblems, setting: Setting) -> list[Run]:
        """One run for each seed.

        Raises:
            ConfigError: the model cannot be loaded.
            StuckError, WorkerError: a process did not answer in time, or failed.
        """
        return [self._run(suite, setting, seed) for seed in self.sweep.run_seeds]

    def _run(self, suite: SuiteProblems, setting: Setting, seed: int) -> Run:
        requests = self.sweep.requests(suite)
        starts = range(0, len(requests), _CHUNK)
        chunks = [Chunk(i, tuple(requests[first : first + _CHUNK])) for i, first in enumerate(starts)]
        name = f"{suite.suite.name} {setting.decoding} block {setting.block_size} seed {seed}".replace(" ", "-")
        identity = self._identity(setting, seed)
        self.progress.begin(f"{suite.suite.name}, {setting.decoding}", len(requests))
        done: dict[int, Answered] = {}
        for chunk in chunks:
            if answered := self.parts.load(name, chunk, identity):
                done[chunk.index] = answered
                self.progress.advance(len(chunk.requests))
        if missing := [chunk for chunk in chunks if chunk.index not in done]:
            self._load()
            for answered in self.workers.respond(
                missing, setting.unmasking, setting.block_size, self.sweep.temperature, seed
            ):
                self.parts.save(name, chunks[answered.index], identity, answered)
                done[answered.index] = answered
                self.progress.advance(len(answered.responses))
        ordered = [done[chunk.index] for chunk in chunks]
        return Run([r for answered in ordered for r in answered.responses], sum(a.seconds for a in ordered))

    def _load(self) -> None:
        if not self._loaded:
            with model_errors(self.field, self.spec.path):
                self.workers.load(self.spec)
            self._loaded = True

    def _identity(self, setting: Setting, seed: int) -> dict[str, Any]:
        """What the responses depend on, besides the requests."""
        return {
            "model": self._content,
            "kind": self.spec.kind,
            "unmasking": setting.unmasking.model_dump() if setting.unmasking else None,
            "block_size": setting.block_size,
            "temperature": self.sweep.temperature,
            "seed": seed,
            "dtype": self.spec.dtype,
            "ends": self.spec.ends,
        }
