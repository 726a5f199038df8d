"""Every divergence and top-k form against a float64 transcription; gradients; chunking; conventions."""

import math

import pytest
import torch

from common.config.divergences import ForwardKL, JensenShannon, MixedKL, ReverseKL
from learner.objective import ChunkedDivergence, HiddenTarget, TopKTarget, divergence, empty_sums

KINDS = [ForwardKL(), ReverseKL(), MixedKL(alpha=0.3), JensenShannon(alpha=0.5), JensenShannon(alpha=0.2)]
POSITIONS, D, V, K = 7, 6, 20, 4
CPU = torch.device("cpu")


def direct(kind, t, s) -> float:
    """Formula by formula on two lists of probabilities."""

    def kl(p, q):
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    if isinstance(kind, ForwardKL):
        return kl(t, s)
    if isinstance(kind, ReverseKL):
        return kl(s, t)
    if isinstance(kind, MixedKL):
        return (1 - kind.alpha) * kl(t, s) + kind.alpha * kl(s, t)
    m = [kind.alpha * a + (1 - kind.alpha) * b for a, b in zip(t, s, strict=True)]
    return kind.alpha * kl(t, m) + (1 - kind.alpha) * kl(s, m)


def data(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, D, generator=g, dtype=dtype)
    weight = torch.randn(V, D, generator=g, dtype=dtype)
    teacher_hidden = torch.randn(POSITIONS, D, generator=g, dtype=dtype)
    head = torch.randn(V, D, generator=g, dtype=dtype)
    coefficient = torch.rand(POSITIONS, generator=g, dtype=dtype)
    return hidden, weight, teacher_hidden, head, coefficient


def topk_of(teacher_hidden, head, tail) -> TopKTarget:
    log_p = (teacher_hidden @ head.T).log_softmax(-1)
    top = log_p.topk(K, dim=-1)
    log_tail_mass = torch.log1p(-top.values.exp().sum(-1))
    return TopKTarget(ids=top.indices, logprobs=top.values, log_tail_mass=log_tail_mass, tail=tail)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_full_vocabulary(kind):
    hidden, weight, teacher_hidden, head, _ = data()
    target = HiddenTarget(teacher_hidden, head)
    values = divergence(kind, *target.classes(hidden @ weight.T))
    t, s = (teacher_hidden @ head.T).softmax(-1), (hidden @ weight.T).softmax(-1)
    for i in range(POSITIONS):
        assert values[i].item() == pytest.approx(direct(kind, t[i].tolist(), s[i].tolist()), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
@pytest.mark.parametrize("tail", ["renorm", "bucket"])
def test_topk(kind, tail):
    hidden, weight, teacher_hidden, head, _ = data()
    target = topk_of(teacher_hidden, head, tail)
    values = divergence(kind, *target.classes(hidden @ weight.T))
    t, s = (teacher_hidden @ head.T).softmax(-1), (hidden @ weight.T).softmax(-1)
    for i in range(POSITIONS):
        p, q = t[i, target.ids[i]].tolist(), s[i, target.ids[i]].tolist()
        if tail == "renorm":
            p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
        else:
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        assert values[i].item() == pytest.approx(direct(kind, p, q), rel=1e-9)


def test_topk_drop_is_the_released_sum_and_may_be_negative():
    hidden, weight, teacher_hidden, head, _ = data()
    target = topk_of(teacher_hidden, head, "drop")
    values = divergence(ForwardKL(), *target.classes(hidden @ weight.T))
    t, s = (teacher_hidden @ head.T).softmax(-1), (hidden @ weight.T).softmax(-1)
    for i in range(POSITIONS):
        expected = sum(
            p * math.log(p / q) for p, q in zip(t[i, target.ids[i]].tolist(), s[i, target.ids[i]].tolist(), strict=True)
        )
        assert values[i].item() == pytest.approx(expected, rel=1e-9)
    flat = torch.zeros(1, V)
    peaked = TopKTarget(
        ids=torch.arange(K)[None],
        logprobs=torch.full((1, K), -5.0),
        log_tail_mass=torch.tensor([0.0]),
        tail="drop",
    )
    assert divergence(ForwardKL(), *peaked.classes(flat)).item() < 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_bucket_is_a_lower_bound_of_the_full_divergence(kind):
    hidden, weight, teacher_hidden, head, _ = data(3)
    logits = hidden @ weight.T
    full = divergence(kind, *HiddenTarget(teacher_hidden, head).classes(logits))
    bucket = divergence(kind, *topk_of(teacher_hidden, head, "bucket").classes(logits))
    assert (bucket >= 0).all()
    assert (bucket <= full + 1e-12).all()


def test_impossible_tokens_cost_nothing_and_give_no_nan():
    log_t = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    log_s = torch.tensor([[math.log(0.25), math.log(0.75)]], dtype=torch.float64, requires_grad=True)
    value = divergence(ForwardKL(), log_t, log_s)
    assert value.item() == pytest.approx(math.log(4))
    value.backward()
    assert torch.isfinite(log_s.grad).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
@pytest.mark.parametrize("form", ["hidden", "drop", "renorm", "bucket"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_loss_and_gradients(kind, form, chunk):
    hidden, weight, teacher_hidden, head, coefficient = data()
    target = HiddenTarget(teacher_hidden, head) if form == "hidden" else topk_of(teacher_hidden, head, form)
    hidden.requires_grad_()
    weight.requires_grad_()
    sums = empty_sums(CPU)
    loss = ChunkedDivergence.apply(hidden, weight, target, coefficient, kind, chunk, sums)
    (2 * loss).backward()
    fast = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    per_position = divergence(kind, *target.classes(hidden @ weight.T))
    slow = (coefficient * per_position).sum()
    (2 * slow).backward()
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(fast, (hidden.grad, weight.grad))
    assert sums.divergence.item() == pytest.approx(per_position.sum().item())
    assert sums.loss.item() == pytest.approx(slow.item())
    assert sums.bad.item() == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_gradcheck(kind):
    hidden, weight, teacher_hidden, head, coefficient = data()
    target = HiddenTarget(teacher_hidden, head)

    def loss(h, w):
        return ChunkedDivergence.apply(h, w, target, coefficient, kind, 3, empty_sums(CPU))

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_bad_positions_are_counted():
    hidden, weight, teacher_hidden, head, coefficient = data()
    hidden[2] = math.nan
    sums = empty_sums(CPU)
    ChunkedDivergence.apply(hidden, weight, HiddenTarget(teacher_hidden, head), coefficient, ForwardKL(), 3, sums)
    assert sums.bad.item() == 1


def test_no_positions():
    hidden, weight, _, head, _ = data()
    hidden = hidden[:0].requires_grad_()
    target = HiddenTarget(torch.zeros(0, D, dtype=torch.float64), head)
    loss = ChunkedDivergence.apply(
        hidden, weight.requires_grad_(), target, torch.zeros(0), ForwardKL(), 3, empty_sums(CPU)
    )
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().sum() == 0
