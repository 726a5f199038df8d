"""The target phi: reshaped teacher distributions and hard labels, against float64 transcriptions; what is refused."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.teacher.targets import TopkTargets, log_tail_mass, reshape_topk
from common.config.divergences import ForwardKL, JensenShannon
from common.config.objective import ObjectiveConfig
from common.config.targets import TeacherTarget
from common.reshaping import reshape
from learner.objective import ChunkedDivergence, HiddenTarget, LabelTarget, divergence, empty_sums
from tests.unit.test_config import run_config
from tests.unit.test_objective import CPU, POSITIONS, D, V, data, direct

SHAPES = [
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 8, "top_p": 0.8, "min_p": 0.3},
]


def direct_shape(logits: list[float], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """Filter by filter, token by token."""
    weight = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    kept = sorted(weight, key=lambda i: -weight[i])[: top_k or None]
    total = sum(weight[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass < top_p:
            nucleus.append(i)
        mass += weight[i] / total
    nucleus = [i for i in nucleus if weight[i] >= min_p * weight[nucleus[0]]]
    total = sum(weight[i] for i in nucleus)
    return [weight[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reshaped_distribution(shape):
    logits = torch.randn(9, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    reshaped = reshape(logits, TeacherTarget(**shape)).exp()
    expected = [direct_shape(row, **shape) for row in logits.tolist()]
    torch.testing.assert_close(reshaped, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", [s for s in SHAPES if "top_k" in s], ids=str)
def test_topk_targets_are_reshaped_exactly_within_the_k(shape):
    logits = torch.randn(9, V, generator=torch.Generator().manual_seed(1)) * 2
    best = logits.log_softmax(-1).topk(8, dim=-1)
    targets = TopkTargets(best.indices.int().numpy(), best.values.numpy(), log_tail_mass(best.values.numpy()))
    reshaped = reshape_topk(targets, TeacherTarget(**shape))
    for row in range(9):
        full = direct_shape(logits[row].double().tolist(), **shape)
        np.testing.assert_allclose(
            np.exp(reshaped.logprobs[row]), [full[i] for i in targets.ids[row]], rtol=1e-4, atol=1e-9
        )
    assert np.exp(reshaped.log_tail_mass).max() < 1e-11


@pytest.mark.parametrize("kind", [ForwardKL(), JensenShannon(alpha=0.3)], ids=lambda k: k.kind)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divergence_from_a_reshaped_teacher(kind, shape):
    hidden, weight, teacher_hidden, head, _ = data()
    target = HiddenTarget(teacher_hidden, head, TeacherTarget(**shape))
    values = divergence(kind, *target.classes(hidden @ weight.T))
    students = (hidden @ weight.T).softmax(-1).tolist()
    teachers = (teacher_hidden @ head.T).tolist()
    for value, s, t in zip(values.tolist(), students, teachers, strict=True):
        assert value == pytest.approx(direct(kind, direct_shape(t, **shape), s), rel=1e-9)


def test_hard_labels_give_the_cross_entropy_and_its_gradient():
    hidden, weight, _, _, coefficient = data()
    ids = torch.randint(0, V, (POSITIONS,), generator=torch.Generator().manual_seed(2))
    hidden.requires_grad_()
    weight.requires_grad_()
    sums = empty_sums(CPU)
    loss = ChunkedDivergence.apply(hidden, weight, LabelTarget(ids), coefficient, ForwardKL(), 3, sums)
    fast = torch.autograd.grad(loss, (hidden, weight))
    logits = hidden @ weight.T
    slow = (coefficient * torch.nn.functional.cross_entropy(logits, ids, reduction="none")).sum()
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(fast, torch.autograd.grad(slow, (hidden, weight)))
    assert sums.agree.item() == (logits.argmax(-1) == ids).sum().item()


def test_hard_labels_give_the_full_jensen_shannon_divergence():
    hidden, weight, _, _, _ = data()
    ids = torch.arange(POSITIONS)
    kind = JensenShannon(alpha=0.3)
    values = divergence(kind, *LabelTarget(ids).classes(hidden @ weight.T))
    for i, s in enumerate((hidden @ weight.T).softmax(-1).tolist()):
        assert values[i].item() == pytest.approx(direct(kind, [float(j == i) for j in range(V)], s), rel=1e-9)


@pytest.mark.parametrize("kind", [ForwardKL(), JensenShannon(alpha=0.3)], ids=lambda k: k.kind)
def test_gradcheck_of_hard_labels_and_reshaped_teachers(kind):
    hidden, weight, teacher_hidden, head, coefficient = data()
    for target in (LabelTarget(torch.arange(POSITIONS)), HiddenTarget(teacher_hidden, head, TeacherTarget(top_p=0.7))):

        def loss(h, w, target=target):
            return ChunkedDivergence.apply(h, w, target, coefficient, kind, 3, empty_sums(CPU))

        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        assert torch.autograd.gradcheck(loss, inputs)
    assert hidden.shape == (POSITIONS, D)


@pytest.mark.parametrize("kind", ["reverse_kl", "mixed_kl"])
@pytest.mark.parametrize(
    ("target", "message"),
    [({"kind": "hard"}, "from hard labels is infinite"), ({"kind": "teacher", "top_p": 0.9}, "probability 0")],
)
def test_infinite_divergences_are_refused(kind, target, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig(divergence={"kind": kind}, target=target)


def test_topk_is_reshaped_only_where_that_is_exact():
    topk = {"target": "topk", "top_k": 16}
    for shape in ({"temperature": 2.0}, {"top_p": 0.9}, {"top_k": 20}):
        with pytest.raises(ValidationError, match=r"set objective\.target\.top_k between 1 and 16"):
            run_config(teacher=topk, objective={"target": {"kind": "teacher", **shape}})
    run_config(teacher=topk, objective={"target": {"kind": "teacher", "top_p": 0.9, "top_k": 16}})


def test_hard_labels_start_no_teacher():
    assert run_config(objective={"target": {"kind": "hard"}}).target_kind == "none"
    assert run_config(teacher={"target": "topk"}).target_kind == "topk"
