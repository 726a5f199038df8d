"""Clip, importance weight and extra terms: each against a few lines of its formula in float64, gradients included."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.config.divergences import ForwardKL
from common.config.objective import ObjectiveConfig
from common.config.unmasking import DynamicUnmasking
from common.seeds import state_rng
from common.states import select_states
from common.student import hidden_states, load_model, load_tokenizer
from learner.batches import BatchBuilder
from learner.objective import ChunkedDivergence, HiddenTarget, LabelTarget, empty_sums
from learner.terms import LogitTerms, Pairs, misalignment
from tests.models import tiny_qwen3
from tests.unit.test_config import run_config
from tests.unit.test_objective import CPU, POSITIONS, V, data
from tests.unit.test_parity import BLOCK, builder, set_targets, trajectories

LABELS = torch.randint(0, V, (POSITIONS,), generator=torch.Generator().manual_seed(5))
ROUNDS = [0, 1, 1, 0, 2, 1, 0]
NOISE = torch.tensor([0.02, 0.9, 0.3, 0.6, 0.99, 0.1, 0.5])
GROUP_ENDS = [3, 6, 7]  # blocks of the seven positions


def pairs() -> Pairs:
    """By hand: (0, 1), (0, 2) in the first block; (3, 4), (3, 5), (5, 4) in the second; none in the last."""
    coefficient = torch.tensor([0.5, 0.5, 0.3, 0.3, 0.3], dtype=torch.float64)
    return Pairs(
        earlier=torch.tensor([0, 0, 3, 3, 5]),
        later=torch.tensor([1, 2, 4, 5, 4]),
        coefficient=coefficient,
        group_ends=GROUP_ENDS,
        pair_ends=[2, 5, 5],
    )


def direct_loss(objective, hidden, weight, teacher_hidden, head, coefficient):
    """One position after another."""
    log_s, log_t = (hidden @ weight.T).log_softmax(-1), (teacher_hidden @ head.T).log_softmax(-1)
    entropy = -(log_s.exp() * log_s).sum(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(POSITIONS):
        d = (log_t[i].exp() * (log_t[i] - log_s[i])).sum()
        if objective.outliers.kind != "none" and NOISE[i] >= (log_t[i, LABELS[i]] - log_s[i, LABELS[i]]).exp():
            d = torch.zeros_like(d)
            if objective.outliers.kind == "forward_kl":
                best = sorted(range(V), key=lambda v: -log_t[i, v].item())[: objective.outliers.top_k]
                p, q = log_t[i, best].exp(), log_s[i, best].exp()
                if objective.topk_tail == "bucket":
                    p, q = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([q, 1 - q.sum(0, keepdim=True)])
                if objective.topk_tail == "renorm":
                    p, q = p / p.sum(), q / q.sum()
                d = (p * (p / q).log()).sum()
        if objective.clip_nats:
            d = torch.minimum(d, torch.tensor(objective.clip_nats, dtype=torch.float64))
        if objective.importance_weight:
            d = d * min(1.0, (log_t[i, LABELS[i]] - log_s[i, LABELS[i]]).exp().item())
        loss = loss + coefficient[i] * d
        if log_t[i].argmax() == log_s[i].argmax():
            loss = loss + objective.terms.sharpening * coefficient[i] * entropy[i]
    if objective.terms.rank:
        for a, b, c in [(0, 1, 0.5), (0, 2, 0.5), (3, 4, 0.3), (3, 5, 0.3), (5, 4, 0.3)]:
            gap = entropy[a] - entropy[b] + objective.terms.rank_margin
            loss = loss + objective.terms.rank * c * torch.relu(gap)
    return loss


CHOICES = [
    {"clip_nats": 2.0},
    {"importance_weight": True},
    {"terms": {"sharpening": 0.7}},
    {"terms": {"rank": 0.4, "rank_margin": 0.1}},
    {"outliers": {"kind": "forward_kl", "top_k": 3}},
    {"outliers": {"kind": "forward_kl", "top_k": 5}, "topk_tail": "renorm"},
    {"outliers": {"kind": "forward_kl", "top_k": 5}, "topk_tail": "drop", "clip_nats": 1.0},
    {"outliers": {"kind": "left_out"}, "terms": {"sharpening": 0.2}},
    {"clip_nats": 3.0, "importance_weight": True, "terms": {"sharpening": 0.2, "rank": 0.3}},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_logit_terms(choice, chunk):
    objective = ObjectiveConfig(**choice)
    hidden, weight, teacher_hidden, head, coefficient = data(4)
    teacher_hidden[:2] = hidden[:2]  # some positions agree
    head[:] = weight + 0.3 * head
    hidden.requires_grad_()
    weight.requires_grad_()
    terms = LogitTerms(
        objective, LABELS, pairs() if objective.terms.rank else None, noise=NOISE if objective.routes else None
    )
    target, sums = HiddenTarget(teacher_hidden, head), empty_sums(CPU)
    loss = ChunkedDivergence.apply(hidden, weight, target, coefficient, ForwardKL(), chunk, sums, terms)
    slow = direct_loss(objective, hidden, weight, teacher_hidden, head, coefficient)
    plain = direct_loss(ObjectiveConfig(), hidden, weight, teacher_hidden, head, coefficient)
    assert abs(slow - plain) > 1e-3
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(slow, (hidden, weight)))
    assert sums.loss.item() == pytest.approx(slow.item())


@pytest.mark.parametrize("choice", [c for c in CHOICES if "importance_weight" not in c], ids=str)
def test_gradcheck(choice):
    """The importance weight is left out: by definition it has no gradient. Nor has what routes a position."""
    hidden, weight, teacher_hidden, head, coefficient = data(4)
    objective = ObjectiveConfig(**choice)
    terms = LogitTerms(
        objective, LABELS, pairs() if objective.terms.rank else None, noise=NOISE if objective.routes else None
    )

    def loss(h, w):
        target = HiddenTarget(teacher_hidden, head)
        return ChunkedDivergence.apply(h, w, target, coefficient, ForwardKL(), 2, empty_sums(CPU), terms)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_the_share_of_trusted_positions_is_counted_and_the_draw_is_the_positions_own(model_and_rows):
    """Noise below min(p_t / p_s, 1) of the token in x0; it depends on trajectory, position and state, and not on how
    the update is packed."""
    hidden, weight, teacher_hidden, head, coefficient = data(4)
    objective, sums = ObjectiveConfig(method="tropd"), empty_sums(CPU)
    terms = LogitTerms(objective, LABELS, noise=NOISE)
    target = HiddenTarget(teacher_hidden, head)
    ChunkedDivergence.apply(hidden, weight, target, coefficient, objective.divergence, 3, sums, terms)
    p_s, p_t = (hidden @ weight.T).softmax(-1), (teacher_hidden @ head.T).softmax(-1)
    expected = sum(
        float(n) < (p_t[i, y] / p_s[i, y]).item() for i, (n, y) in enumerate(zip(NOISE, LABELS, strict=True))
    )
    assert 0 < sums.trusted.item() == expected < POSITIONS

    model, tokenizer, rows = model_and_rows
    plain = builder(tokenizer, model)

    def noise(max_tokens: int) -> dict[tuple[int, int, int], float]:
        build = replace(plain, max_tokens=max_tokens, objective=objective, seed=3)
        found = {}
        for rank in range(2):
            for micro in build.update(rows, rank, 2)[0]:
                where = zip(
                    micro.loss_doc.tolist(),
                    micro.positions.ravel()[micro.loss_index].tolist(),
                    micro.copy.ravel()[micro.loss_index].tolist(),
                    strict=True,
                )
                found |= dict(zip(where, build.tensors(micro, rows).terms.noise.tolist(), strict=True))
        return found

    drawn = noise(64)
    assert drawn == noise(4096)
    assert len(set(drawn.values())) > 0.9 * len(drawn)


def test_entropy_is_counted_where_it_is_wanted():
    hidden, weight, _, _, coefficient = data()
    for wanted in (False, True):
        sums, terms = empty_sums(CPU), LogitTerms(ObjectiveConfig(), LABELS, want_entropy=wanted)
        ChunkedDivergence.apply(hidden, weight, LabelTarget(LABELS), coefficient, ForwardKL(), 3, sums, terms)
        p = (hidden @ weight.T).softmax(-1)
        assert sums.entropy.item() == pytest.approx(-(p * p.log()).sum().item() if wanted else 0.0)


def test_misalignment():
    student, _, teacher, _, coefficient = data()
    value = misalignment(student.requires_grad_(), teacher, coefficient)
    direct = sum(
        c * (1 - (s @ t) / (s.norm() * t.norm())) for s, t, c in zip(student, teacher, coefficient, strict=True)
    )
    torch.testing.assert_close(value, direct)
    assert torch.autograd.gradcheck(lambda s: misalignment(s, teacher, coefficient), (student,))


@pytest.fixture(scope="module")
def model_and_rows(tmp_path_factory):
    path = tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0)
    model, tokenizer = load_model(path, torch.float32, "sdpa"), load_tokenizer(path)
    rows = trajectories(model, tokenizer, DynamicUnmasking(threshold=0.05))
    for t in rows:
        select_states(t, ObjectiveConfig(), BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    set_targets(model, rows)
    return model, tokenizer, rows


def packed(model, tokenizer, rows, **objective):
    plain = builder(tokenizer, model)
    build = BatchBuilder(
        plain.meta, "row_mean", "bucket", 256, "sdpa", CPU, plain.teacher_head, ObjectiveConfig(**objective)
    )
    batches, _ = build.update(rows, 0, 1)
    return [(micro, build.tensors(micro, rows)) for micro in batches]


def test_pairs_are_those_of_the_rounds(model_and_rows):
    """A block's pairs: every masked trained position against every later-revealed one."""
    model, tokenizer, rows = model_and_rows
    expected, found = [], []
    for doc, t in enumerate(rows):
        trained = t.masked_offsets[t.loss_weight > 0]
        block = (len(t.prompt_ids) + trained) // BLOCK
        expected += [
            (doc, int(a), int(b))
            for i, a in enumerate(trained)
            for j, b in enumerate(trained)
            if block[i] == block[j] and t.reveal_round[a] < t.reveal_round[b]
        ]
    for micro, x in packed(model, tokenizer, rows, terms={"rank": 1.0}):
        offset = micro.positions.ravel()[micro.loss_index] - [len(rows[d].prompt_ids) for d in micro.loss_doc]
        assert (
            micro.loss_label == [rows[d].response_ids[o] for d, o in zip(micro.loss_doc, offset, strict=True)]
        ).all()
        p = x.terms.pairs
        for a, b in zip(p.earlier.tolist(), p.later.tolist(), strict=True):
            assert micro.loss_doc[a] == micro.loss_doc[b]
            found.append((micro.loss_doc[a], offset[a], offset[b]))
        assert p.group_ends[-1] == len(micro.loss_index)
        assert p.pair_ends[-1] == len(p.earlier)
        covered = [(rows.start, rows.stop) for rows, _ in x.terms.spans(len(micro.loss_index), 5)]
        assert [a for a, _ in covered] == [0, *[b for _, b in covered[:-1]]]
        assert covered[-1][1] == len(micro.loss_index)
    assert sorted(found) == sorted(expected)


def test_next_tokens_are_read_autoregressively(model_and_rows):
    """The causal documents in the packed rows give the log-probabilities of a plain causal forward of each row."""
    model, tokenizer, rows = model_and_rows
    loss = 0.0
    for _, x in packed(model, tokenizer, rows, terms={"autoregressive": 1.0}):
        with torch.no_grad():
            hidden = hidden_states(model, x.ids, x.positions, x.mask)
            logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[x.next_tokens.index])
        entropy = torch.nn.functional.cross_entropy(logits, x.next_tokens.label, reduction="none")
        loss += (x.next_tokens.coefficient * entropy).sum().item()
    direct = []
    for t in rows:
        ids = torch.from_numpy(t.causal_ids.astype(np.int64))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        direct.append(torch.stack([-log_p[i - 1, ids[i]] for i in range(len(t.prompt_ids), len(ids))]).mean())
    assert loss == pytest.approx(torch.stack(direct).mean().item(), abs=1e-5)


def test_the_divergence_is_the_same_with_causal_documents_beside(model_and_rows):
    model, tokenizer, rows = model_and_rows

    def loss(**objective) -> float:
        total = 0.0
        for _, x in packed(model, tokenizer, rows, **objective):
            with torch.no_grad():
                hidden = hidden_states(model, x.ids, x.positions, x.mask)
                masked = hidden.reshape(-1, hidden.shape[-1])[x.loss_index]
                head, sums = model.lm_head.weight, empty_sums(CPU)
                total += ChunkedDivergence.apply(
                    masked, head, x.target, x.coefficient, ForwardKL(), 64, sums, x.terms
                ).item()
        return total

    assert loss(terms={"autoregressive": 1.0}) == pytest.approx(loss(), abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"importance_weight": True, "target": {"kind": "hard"}}, "importance_weight compares with a teacher"),
        ({"terms": {"alignment": 1}, "target": {"kind": "hard"}}, r"terms\.alignment compares with a teacher"),
        ({"outliers": {"kind": "left_out"}, "target": {"kind": "hard"}}, "outliers compares with a teacher"),
        ({"method": "tropd", "divergence": {"kind": "forward_kl"}}, r"means divergence\.kind reverse_kl"),
        ({"terms": {"rank": 1}, "method": "sft"}, "which source.kind 'offline' does not have"),
    ],
)
def test_terms_that_lack_what_they_need_are_refused(objective, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig(**objective)


def test_hidden_states_are_needed():
    for objective in ({"importance_weight": True}, {"terms": {"alignment": 0.1}}, {"method": "tropd"}):
        run_config(objective=objective)
        with pytest.raises(ValidationError, match=r"set teacher\.target to 'hidden'"):
            run_config(objective=objective, teacher={"target": "topk"})
