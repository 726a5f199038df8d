"""What is counted in an evaluation, and the deviations of its metrics."""

import numpy as np
import pytest

from actors.evaluation.evaluation import Evaluation, evaluate_shard
from actors.evaluation.generation import load_student, sampler_of
from actors.evaluation.responses import Response
from actors.sampler.sampling import Decoding
from common.config.unmasking import StaticUnmasking
from common.conversion import convert_folder
from common.prompts import Prompt
from tests.models import tiny_qwen3


def response(*, tokens: int, denoise: int, commits: int, reason: str = "eos") -> Response:
    return Response(0, 0, np.zeros(tokens, np.int32), "", denoise, commits, reason)


def some(correct: list[bool], tokens: list[int]) -> Evaluation:
    evaluation = Evaluation(seconds=2.0)
    for right, length in zip(correct, tokens, strict=True):
        reason = "eos" if right else "length"
        evaluation.add(response(tokens=length, denoise=length // 2, commits=length // 4, reason=reason), right)
    return evaluation


def test_metrics_are_ratios_of_sums_and_shards_add_up():
    both = some([True, False], [8, 24]) + some([True], [16])
    assert both.metrics() == {
        "exact_match": pytest.approx(2 / 3),
        "tokens_per_step": 2.0,
        "forwards_per_token": 0.5,
        "forwards_per_token_with_commits": 0.75,
        "response_tokens_mean": 16.0,
        "share_ended": pytest.approx(2 / 3),
        "tokens_per_second": 12.0,
        "problems": 3,
        "seconds": 4.0,
    }
    assert Evaluation().metrics()["exact_match"] == 0


def test_bootstrap_deviation_equals_the_standard_error():
    n, share = 400, 0.3
    evaluation = some([i < n * share for i in range(n)], [8] * n)
    spread = evaluation.spread_over_problems(resamples=4000)
    assert spread["exact_match"] == pytest.approx(np.sqrt(share * (1 - share) / n), rel=0.05)
    assert spread["tokens_per_step"] == 0
    assert spread == evaluation.spread_over_problems(resamples=4000)  # seeded
    assert "tokens_per_second" not in spread


def test_counts_are_those_of_the_trajectories(tmp_path):
    import torch

    convert_folder(tiny_qwen3(tmp_path / "arlm"), tmp_path / "student", 4, "<|mask|>", torch.float32)
    model, tokenizer = load_student(str(tmp_path / "student"), "float32", "cpu")
    sampler = sampler_of(model, tokenizer, block_size=None, slots=2)
    problems = [Prompt(i, "", np.full(4 + i, 65, dtype=np.int32), answer="1") for i in range(3)]
    evaluation = evaluate_shard(sampler, tokenizer, problems, Decoding(StaticUnmasking(), 0.0), 8)
    done = evaluation.metrics()
    assert done["problems"] == 3
    assert done["forwards_per_token"] >= 1  # one token a step, and none is left out
    assert done["seconds"] > 0
    sampler.set_block_size(16)
    counts = evaluate_shard(sampler, tokenizer, problems, Decoding(StaticUnmasking(), 0.0), 10).counts
    tokens, steps, ended = counts[:, 1], counts[:, 2], counts[:, 4] > 0
    assert (ended & (tokens <= 10) | (tokens == 10)).all()
    assert sorted(steps) == [10, 11, 12]  # one a position of the block, those behind the limit included


def test_a_folder_that_was_never_converted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="opdlm convert"):
        load_student(tiny_qwen3(tmp_path / "arlm"), "float32", "cpu")
