"""Student and teacher whose LM heads have different numbers of rows: the tokens that both know count, padding not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.evaluation.generation import sampler_of
from actors.responder import ResponseRequest, SamplerEngine, Sampling
from actors.rollout import RolloutActor
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from actors.teacher.actor import build_backend
from common.config.divergences import ForwardKL, ReverseKL
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.run import RunConfig
from common.config.targets import TeacherTarget
from common.config.teacher import TeacherConfig
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert, counted_tokens
from common.student import fitted_head, head_of_folder, load_model
from deploy.model_checks import check_models
from deploy.placement import plan
from learner.objective import HiddenTarget, divergence
from tests.models import tiny_qwen3, tiny_tokenizer
from tests.unit.test_teacher import requests

TOKENS = 263  # of the tiny tokenizer, its mask token included


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student of 288 rows, and a teacher of 320."""
    folder = tmp_path_factory.mktemp("pair")
    return tiny_qwen3(folder / "student", vocab=288), tiny_qwen3(folder / "teacher", vocab=320, seed=1)


@pytest.fixture(scope="module")
def loud(pair, tmp_path_factory):
    """The teacher with padding rows that would take all the probability."""
    folder = Path(shutil.copytree(pair[1], tmp_path_factory.mktemp("loud") / "teacher"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][TOKENS:] *= 50
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_the_rows_that_count(pair):
    student, teacher = pair
    assert counted_tokens(convert(student, 4), student) is None
    assert counted_tokens(convert(student, 4), teacher) == counted_tokens(convert(teacher, 4), student) == TOKENS


def backend(path: str, target: str, tokens: int | None):
    config = TeacherConfig(backend="transformers", target=target, dtype="float32", max_batched_tokens=80)
    return build_backend(config, path, tokens)


def asked():
    return [r for r in requests() if r.ids.max() < TOKENS]


def test_top_k_targets_are_of_the_tokens_alone(pair, loud):
    exact = backend(pair[1], "hidden", None).targets(asked())
    head = head_of_folder(pair[1])[:TOKENS].numpy()
    for path in (pair[1], loud):
        for targets, hidden in zip(backend(path, "topk", TOKENS).targets(asked()), exact, strict=True):
            expected = torch.from_numpy(hidden.hidden @ head.T).log_softmax(-1)
            best = expected.topk(16)
            assert targets.ids.tolist() == best.indices.tolist()
            np.testing.assert_allclose(targets.logprobs, best.values.numpy(), atol=1e-4)
            tail = 1 - best.values.exp().sum(-1)
            np.testing.assert_allclose(np.exp(targets.log_tail_mass), tail.numpy(), atol=1e-4)


@pytest.mark.parametrize("rows", [288, 320])
@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL()])
@pytest.mark.parametrize("shape", [TeacherTarget(), TeacherTarget(temperature=0.5, top_k=9)], ids=["whole", "top-9"])
def test_hidden_targets_are_of_the_tokens_alone(pair, loud, rows, kind, shape):
    """KL against the student's own softmax over all its rows, written out; the same however loud the padding is."""
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    logits = 3 * torch.randn(7, rows, generator=torch.Generator().manual_seed(1))
    head = head_of_folder(pair[1])
    teacher = (hidden @ head[:TOKENS].T / shape.temperature).double()
    if shape.top_k:
        teacher[teacher < teacher.topk(shape.top_k).values[:, -1:]] = -np.inf
    p, q = teacher.softmax(-1), logits.double().softmax(-1)
    if isinstance(kind, ForwardKL):
        expected = torch.where(p > 0, p * (p.log() - q[:, :TOKENS].log()), 0).sum(-1)
    else:  # what has no probability is taken as exp(-60)
        floor = torch.full_like(q, np.exp(-60))
        floor[:, :TOKENS] = torch.where(p > 0, p, np.exp(-60))
        expected = (q * (q.log() - floor.log())).sum(-1)
    for path in (pair[1], loud):
        target = HiddenTarget(hidden, fitted_head(head_of_folder(path), TOKENS, rows), shape, TOKENS)
        torch.testing.assert_close(divergence(kind, *target.classes(logits)).double(), expected, atol=1e-4, rtol=1e-4)
        assert target.agree(*target.classes(logits), logits).dtype == torch.bool


def test_gradients_are_finite(pair):
    logits = torch.randn(5, 288, requires_grad=True)
    target = HiddenTarget(torch.randn(5, 64), fitted_head(head_of_folder(pair[1]), TOKENS, 288), tokens=TOKENS)
    divergence(ForwardKL(), *target.classes(logits)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, TOKENS:] > 0).all(), "the student's padding loses probability"


def test_rollouts_hold_tokens_alone(pair):
    """The random student gives its padding rows a tenth of the probability."""
    student = pair[0]
    settings = {"model": {"path": student}, "data": {"prompts": "unused"}, "rollout": {"dtype": "float32"}}
    actor = RolloutActor(RunConfig(**settings), 0)
    prompts = [Request(i, 0, np.arange(3 + i, dtype=np.int32), 32) for i in range(8)]
    made = np.concatenate([t.x0 for t in actor.sampler.generate(prompts, Decoding(DynamicUnmasking(), 1.0))])
    assert made.max() < TOKENS
    model = load_model(student, torch.float32, "sdpa")
    model.config.mask_token_id, model.config.block_size = 262, 4
    model.generation_config.eos_token_id = [258]
    sampler = sampler_of(model, actor.tokenizer, block_size=4, slots=4)
    sampler.device_pass.token_count = None
    free = np.concatenate([t.x0 for t in sampler.generate(prompts, Decoding(DynamicUnmasking(), 1.0))])
    assert free.max() >= TOKENS, "the test could not fail"


def test_teacher_responses_hold_tokens_alone(loud):
    engine = SamplerEngine(TeacherConfig(dtype="float32"), loud, TOKENS)
    made = engine.respond([ResponseRequest(0, 0, np.arange(5, dtype=np.int32))], Sampling(20, 1.0, 1.0, [258]), 0)
    assert made[0].max() < TOKENS


def check(student: str, teacher: str, *overrides: str):
    paths = ["--model.path", student, "--teacher.path", teacher, "--teacher.backend", "transformers"]
    return check_models(load_config("tiny", [*paths, *overrides]))


def test_the_difference_is_said_before_the_start(pair):
    (note,) = check(*pair).student.notes
    assert note == (
        "the LM head of model.path has 288 rows and that of teacher.path 320; the teacher's distribution is over its "
        "263 tokens"
    )
    assert check(pair[0], pair[0]).student.notes == ()


def test_hidden_states_of_another_width(pair, tmp_path):
    wide = tiny_qwen3(tmp_path / "wide", hidden=96)
    assert check(pair[0], wide).student.notes == ()
    with pytest.raises(ConfigError, match=r"objective.terms.alignment: hidden states of width 64 .* of width 96"):
        check(pair[0], wide, "--objective.terms.alignment", "1")


def test_a_teacher_with_fewer_rows_than_tokens(pair, tmp_path):
    small = Path(shutil.copytree(pair[1], tmp_path / "small"))
    weights = load_file(small / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:200].clone()
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 200, "pad_token_id": None}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"teacher.path: .* has a tokenizer with ids up to 255 .* of 200 rows"):
        check(pair[0], str(small))


def test_a_teacher_with_another_tokenizer_is_refused_by_the_first_token(tmp_path):
    other = tiny_qwen3(tmp_path / "other", vocab=320, tokenizer=tiny_tokenizer("<more>"))
    student = tiny_qwen3(tmp_path / "student", tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"different tokenizers \('<more>' is no token in the one and 262 in the oth"):
        check(student, other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--teacher.tensor_parallel", "2"], r"resources.gpus \(0\) is not tensor_parallel \(2\)"),
        (["--teacher.resources.gpus", "2"], r"resources.gpus \(2\) is not tensor_parallel \(1\)"),
        (
            ["--teacher.tensor_parallel", "2", "--teacher.resources.gpus", "2", "--teacher.backend", "transformers"],
            r"tensor_parallel \(2\) is vLLM's, but backend is 'transformers'",
        ),
    ],
)
def test_tensor_parallel_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", overrides)


def test_tensor_parallel_in_the_plan():
    """The GPUs of one teacher are one reservation; weights are divided, the gathered logits are not."""
    one = plan(load_config("qwen3-8b"))
    two = plan(load_config("qwen3-8b", ["--teacher.tensor_parallel", "2", "--teacher.resources.gpus", "2"]))
    alone, shared = (next(p for p in each.processes if p.role == "teacher") for each in (one, two))
    assert (alone.gpus, shared.gpus) == (1, 2)
    assert shared.memory["weights on each of 2 GPUs"] == alone.memory["weights"] // 2
    assert shared.memory["logits on each of 2 GPUs"] == alone.memory["logits"]
    with pytest.raises(ConfigError, match="tensor_parallel: 3 does not divide the 32 attention heads"):
        plan(load_config("qwen3-8b", ["--teacher.tensor_parallel", "3", "--teacher.resources.gpus", "3"]))
