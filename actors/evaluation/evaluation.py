"""Exact match and decoding speed on problems with a checkable answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.evaluation.responses import Response, responses
from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.answers import is_correct
from common.config.evaluation import AnswerFormat
from common.prompts import Prompt

_COUNTS = ("correct", "response_tokens", "denoise_forwards", "commit_forwards", "ended")


@dataclass
class Evaluation:
    """The counts of every problem; `+` joins the shards of several actors.

    `counts` is int64 [problems, 5] with the columns correct (0 or 1), response tokens, denoising forwards, commit
    forwards, and ended with the end token (0 or 1). `seconds` is the time spent decoding, summed over shards.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, len(_COUNTS)), dtype=np.int64))
    seconds: float = 0.0

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(np.concatenate([self.counts, other.counts]), self.seconds + other.seconds)

    def add(self, response: Response, correct: bool) -> None:
        forwards = response.denoise_forwards, response.commit_forwards
        row = [correct, len(response.ids), *forwards, response.ended]
        self.counts = np.concatenate([self.counts, [row]], dtype=np.int64)

    def metrics(self) -> dict[str, float]:
        """Ratios for tables and `summary.json`.

        Tokens per step = response tokens / denoising forwards. `forwards_per_token` counts denoising forwards.
        `forwards_per_token_with_commits` also counts the commits of blocks to the cache, as if each took its own
        forward; the sampler does them in the next block's first forward.
        """
        metrics = {name: float(value) for name, value in _ratios(self.counts.sum(axis=0), len(self.counts)).items()}
        tokens = int(self.counts[:, _COUNTS.index("response_tokens")].sum())
        speed = tokens / max(self.seconds, 1e-9)
        return metrics | {"tokens_per_second": speed, "problems": len(self.counts), "seconds": self.seconds}

    def spread_over_problems(self, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
        """Bootstrap: standard deviation of each ratio over sets of equally many problems, sampled with replacement.

        The standard error of the metric as an estimate for all problems of this kind (Efron, 1979).
        """
        problems = len(self.counts)
        rng = np.random.default_rng(seed)
        # [resamples, problems]: how often each problem is in the set
        times = rng.multinomial(problems, np.full(problems, 1 / problems), size=resamples)
        resampled = _ratios(times @ self.counts, problems)
        return {name: float(values.std(ddof=1)) for name, values in resampled.items()}


def _ratios(sums: np.ndarray, problems: int) -> dict[str, np.ndarray]:
    """Metrics of the column sums [..., 5]."""
    correct, tokens, denoise, commits, ended = np.moveaxis(sums.astype(np.float64), -1, 0)
    written, forwards, count = np.maximum(tokens, 1), np.maximum(denoise, 1), max(problems, 1)
    return {
        "exact_match": correct / count,
        "tokens_per_step": tokens / forwards,
        "forwards_per_token": denoise / written,
        "forwards_per_token_with_commits": (denoise + commits) / written,
        "response_tokens_mean": tokens / count,
        "share_ended": ended / count,
    }


def evaluate_shard(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Prompt],
    decoding: Decoding,
    max_new_tokens: int,
    answer_format: AnswerFormat = "answer_line",
) -> Evaluation:
    """Decode the problems with the sampler's current weights, and count."""
    start = time.perf_counter()
    answers = {p.ordinal: p.answer for p in problems}
    requests = [Request(p.ordinal, 0, p.ids, max_new_tokens, p.domain) for p in problems]
    evaluation = Evaluation()
    for response in responses(sampler, tokenizer, requests, decoding):
        evaluation.add(response, is_correct(response.text, answers[response.ordinal] or "", answer_format))
    evaluation.seconds = time.perf_counter() - start
    return evaluation
