"""The learner's loss, packed, chunked and over two ranks, against a loop over rows, states, blocks and positions.

Every normalisation and every option of the objective, with its gradient, in float64.
"""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.config.unmasking import DynamicUnmasking
from common.seeds import state_rng
from common.states import NoiseTokens, select_states
from common.student import load_model, load_tokenizer
from common.trajectory import TrajectoryMeta
from learner.batches import BatchBuilder
from learner.objective import empty_sums
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3
from tests.unit.test_config import run_config
from tests.unit.test_parity import BLOCK, CPU, set_targets, trajectories
from tests.unit.test_targets import direct_shape

NORMALIZATIONS = ["row_mean", "row_sum", "token_mean", "sum"]
K = 6


@pytest.fixture(scope="module")
def student_teacher_rows(tmp_path_factory):
    """Two models of one tokenizer in float64, and the student's rollouts; one row is end tokens only."""
    paths = [tiny_qwen3(tmp_path_factory.mktemp("model"), seed=seed) for seed in (0, 1)]
    student, teacher = (load_model(path, torch.float64, "sdpa") for path in paths)
    for model in (student, teacher):
        model.lm_head.weight.data[7:11] *= 3  # one of these is often the best token of both
    teacher.requires_grad_(False)
    tokenizer = load_tokenizer(paths[0])
    sampled = load_model(paths[0], torch.float32, "sdpa")
    rows = trajectories(sampled, tokenizer, DynamicUnmasking(threshold=0.05), count=6)
    rows[2].response_ids = np.full_like(rows[2].response_ids, tokenizer.eos_token_id)
    return student, teacher, tokenizer, rows


def normalised(totals, counts, normalization):
    """Rows' sums over their positions, brought together; rows without a position do not count."""
    kept = [(total, count) for total, count in zip(totals, counts, strict=True) if count]
    if normalization == "row_mean":
        return sum(total / count for total, count in kept) / len(kept)
    if normalization == "row_sum":
        return sum(total for total, _ in kept) / len(kept)
    if normalization == "token_mean":
        return sum(total for total, _ in kept) / sum(count for _, count in kept)
    return sum(total for total, _ in kept)


def direct_divergence(objective, t, log_s, label):
    """D of one position as it counts, from the teacher's probabilities t [V] and the student's log-probabilities."""
    if objective.target.kind == "hard":
        t = torch.nn.functional.one_hot(torch.tensor(label), len(t)).double()

    def kl(p, log_q):
        return (p[p > 0] * (p[p > 0].log() - log_q[p > 0])).sum()

    if objective.divergence.kind == "forward_kl":
        d = kl(t, log_s)
    elif objective.divergence.kind == "reverse_kl":
        d = kl(log_s.exp(), t.log())
    else:
        m = objective.divergence.alpha * t + (1 - objective.divergence.alpha) * log_s.exp()
        d = objective.divergence.alpha * kl(t, m.log()) + (1 - objective.divergence.alpha) * kl(log_s.exp(), m.log())
    if objective.clip_nats:
        d = d.clamp_max(objective.clip_nats)
    if objective.importance_weight:
        d = d * min(1.0, (t[label] / log_s[label].exp()).item())
    return d


def direct_topk(t, log_s, tail):
    """Forward KL over the teacher's K best tokens and what the tail makes of the others."""
    best = t.topk(K).indices
    p, q = t[best], log_s[best].exp()
    if tail == "renorm":
        p, q = p / p.sum(), q / q.sum()
    if tail == "bucket":
        p, q = torch.cat([p, 1 - p.sum(0, keepdim=True)]), torch.cat([q, 1 - q.sum(0, keepdim=True)])
    return (p * (p / q).log()).sum()


def direct_loss(student, teacher, rows, mask_token_id, config):
    """One block after another, each behind its clean prefix on a plain sequence."""
    objective, terms = config.objective, config.objective.terms
    shape = objective.shape.model_dump(exclude={"kind", "block_aware", "routed_share"})
    totals, counts, causal_totals, causal_counts = [], [], [], []
    for t in rows:
        x0, prompt = t.x0.astype(np.int64), len(t.prompt_ids)
        causal = torch.from_numpy(t.causal_ids.astype(np.int64))[None]
        taught = teacher.model(causal).last_hidden_state[0]
        total, count = 0.0, 0
        for state in range(t.state_count):
            chosen = t.masked_state == state
            weight = dict(
                zip((prompt + t.masked_offsets[chosen]).tolist(), t.loss_weight[chosen].tolist(), strict=True)
            )
            shown = dict(zip(weight, t.shown_ids[chosen].tolist(), strict=True)) if len(t.shown_ids) else {}
            for b in {i // BLOCK for i in weight}:
                x = x0[: (b + 1) * BLOCK].copy()
                inside = [i for i in weight if i // BLOCK == b]
                x[inside] = [shown.get(i, mask_token_id) for i in inside]
                blocks = torch.arange(len(x)) // BLOCK
                mask = (blocks[None, :] <= blocks[:, None])[None, None]
                hidden = student.model(torch.from_numpy(x)[None], attention_mask=mask).last_hidden_state[0]
                log_p = student.lm_head(hidden).log_softmax(-1)
                trained = [i for i in inside if weight[i] > 0]
                entropy = {i: -(log_p[i].exp() * log_p[i]).sum() for i in trained}
                for i in trained:
                    phi = torch.tensor(direct_shape(teacher.lm_head(taught[i - 1]).tolist(), **shape)).double()
                    if config.target_kind == "topk":
                        value = direct_topk(phi, log_p[i], objective.topk_tail)
                    else:
                        value = direct_divergence(objective, phi, log_p[i], x0[i])
                    if log_p[i].argmax() == phi.argmax():
                        value = value + terms.sharpening * entropy[i]
                    if terms.alignment:
                        cosine = (hidden[i] @ taught[i - 1]) / (hidden[i].norm() * taught[i - 1].norm())
                        value = value + terms.alignment * (1 - cosine)
                    total, count = total + weight[i] * value, count + 1
                gaps = [
                    torch.relu(entropy[i] - entropy[j] + terms.rank_margin)
                    for i in trained
                    for j in trained
                    if t.reveal_round[i - prompt] < t.reveal_round[j - prompt]
                ]
                if gaps:
                    total = total + terms.rank * sum(weight[i] for i in trained) * sum(gaps) / len(gaps)
        totals.append(total)
        counts.append(count)
        after = student(causal).logits[0].log_softmax(-1)
        following = range(max(prompt, 1), causal.shape[1])
        causal_totals.append(sum(-after[i - 1, causal[0, i]] for i in following))
        causal_counts.append(len(following))
    loss = normalised(totals, counts, objective.normalization)
    if terms.autoregressive:
        loss = loss + terms.autoregressive * normalised(causal_totals, causal_counts, objective.normalization)
    return loss


def packed_loss(student, teacher, tokenizer, rows, config):
    """As the learner's ranks do it: the loss, whose gradients are added up in the student."""
    objective, width = config.objective, student.config.hidden_size
    meta = TrajectoryMeta(
        BLOCK,
        tokenizer.mask_token_id,
        "test",
        config.target_kind,
        K if config.target_kind == "topk" else width,
    )
    build = BatchBuilder(
        meta=meta,
        normalization=objective.normalization,
        topk_tail=objective.topk_tail,
        max_tokens=64,
        attention="sdpa",
        device=CPU,
        teacher_head=teacher.lm_head.weight,
        objective=objective,
    )
    module, total, micro_batches = TrainingModule(student, config), 0.0, 0
    for rank in range(2):
        sums = empty_sums(CPU)
        for micro in build.update(rows, rank, 2)[0]:
            loss = module(build.tensors(micro, rows), sums)
            loss.backward()
            total += loss.item()
            micro_batches += 1
        assert sums.bad == 0
    assert micro_batches > 2
    return total


def set_topk(teacher, rows) -> None:
    for t in rows:
        causal = torch.from_numpy(t.causal_ids.astype(np.int64))[None]
        with torch.no_grad():
            log_p = teacher(causal).logits[0, len(t.prompt_ids) - 1 + t.target_offsets].log_softmax(-1)
        best = log_p.topk(K, dim=-1)
        t.topk_ids, t.topk_logprobs = best.indices.int().numpy().ravel(), best.values.numpy().ravel()
        t.log_tail_mass = torch.log1p(-best.values.exp().sum(-1)).numpy()


def check(student_teacher_rows, objective, target="hidden"):
    student, teacher, tokenizer, rows = student_teacher_rows
    config = run_config(
        objective={"exclude_eos": True, **objective},
        teacher={"target": target, "top_k": K},
        learner={"logits_chunk_rows": 5},
    )
    noise = NoiseTokens(len(tokenizer), tokenizer.mask_token_id)
    for t in rows:
        select_states(t, config.objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0), noise)
    assert [bool(len(t.target_offsets)) for t in rows] == [True, True, False, True, True, True]
    set_topk(teacher, rows) if target == "topk" else set_targets(teacher, rows)
    student.zero_grad()
    fast = packed_loss(student, teacher, tokenizer, rows, config)
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    slow = direct_loss(student, teacher, rows, tokenizer.mask_token_id, config)
    slow.backward()
    assert fast == pytest.approx(slow.item(), rel=1e-6)
    for name, p in student.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item())
    return slow.item()


@pytest.mark.parametrize("weight", ["one", "inverse_t"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisation(student_teacher_rows, normalization, weight):
    check(student_teacher_rows, {"normalization": normalization, "weight": weight})


OPTIONS = [
    {"state": {"kind": "all_rounds"}},
    {"state": {"kind": "complementary"}, "weight": "inverse_t"},
    {"state": {"kind": "suffix", "decay": 0.5}},
    {"state": {"kind": "random", "uniform_share": 0.5}},
    {"state": {"kind": "random", "uniform_share": 0.3, "all_positions": True}, "weight": "inverse_t"},
    {"divergence": {"kind": "reverse_kl"}},
    {"divergence": {"kind": "jensen_shannon", "alpha": 0.3}},
    {"target": {"kind": "teacher", "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01}},
    {"clip_nats": 3.0},
    {"importance_weight": True},
    {"terms": {"sharpening": 0.5}},
    {"terms": {"rank": 0.5, "rank_margin": 0.2}, "weight": "inverse_t"},
    {"terms": {"alignment": 2.0}},
    {"terms": {"autoregressive": 0.5}},
]


@pytest.fixture(scope="module")
def without_option(student_teacher_rows):
    """The loss of plain states, by their weight, to see that an option changes it."""
    return {w: check(student_teacher_rows, {"normalization": "row_sum", "weight": w}) for w in ("one", "inverse_t")}


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option(student_teacher_rows, without_option, option):
    loss = check(student_teacher_rows, {"normalization": "row_sum", **option})
    assert abs(loss - without_option[option.get("weight", "one")]) > 1e-3


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_all_terms_share_the_normalisation(student_teacher_rows, normalization):
    terms = {"sharpening": 0.3, "rank": 0.5, "rank_margin": 0.2, "alignment": 2.0, "autoregressive": 0.4}
    choice = {"clip_nats": 4.0, "importance_weight": True, "terms": terms}
    check(student_teacher_rows, {"normalization": normalization, **choice})


@pytest.mark.parametrize("tail", ["drop", "renorm", "bucket"])
def test_topk_targets(student_teacher_rows, tail):
    check(student_teacher_rows, {"topk_tail": tail, "normalization": "row_sum"}, target="topk")


def test_hard_labels(student_teacher_rows):
    check(student_teacher_rows, {"target": {"kind": "hard"}, "normalization": "row_sum"})


def test_hidden_states_travel_as_bfloat16_bits(student_teacher_rows):
    student, teacher, tokenizer, rows = student_teacher_rows
    for t in rows:
        select_states(t, run_config().objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    set_targets(teacher, rows)
    width = student.config.hidden_size
    values = [torch.from_numpy(t.hidden).view(-1, width).bfloat16() for t in rows]
    for t, value in zip(rows, values, strict=True):
        t.hidden = value.view(torch.int16).numpy().view(np.uint16).ravel()
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test", "hidden", width, hidden_dtype="bfloat16")
    build = BatchBuilder(meta, "row_mean", "bucket", 4096, "sdpa", CPU, teacher.lm_head.weight)
    (micro,), _ = build.update(rows, 0, 1)
    hidden = build.tensors(micro, rows).target.hidden
    expected = torch.stack([values[d][r] for d, r in zip(micro.loss_doc, micro.loss_target, strict=True)])
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_embeddings_and_head_get_no_gradient_and_all_else_gets_its_own(student_teacher_rows, tmp_path, tied):
    _, teacher, tokenizer, rows = student_teacher_rows
    objective = {"terms": {"alignment": 2.0, "autoregressive": 0.5}}
    found = {}
    for frozen in (False, True):
        student = load_model(tiny_qwen3(tmp_path / str(frozen), seed=0, tied=tied), torch.float64, "sdpa")
        config = run_config(objective=objective, learner={"logits_chunk_rows": 5, "freeze_embeddings": frozen})
        for t in rows:
            select_states(t, config.objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
        set_targets(teacher, rows)
        loss = packed_loss(student, teacher, tokenizer, rows, config)
        found[frozen] = loss, {name: p.grad for name, p in student.named_parameters()}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-12)
    ends = {"model.embed_tokens.weight", "lm_head.weight"} & found[True][1].keys()
    assert len(ends) == (1 if tied else 2)
    for name, gradient in found[True][1].items():
        assert found[False][1][name].abs().max() > 0
        if name in ends:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, found[False][1][name], rtol=1e-9, atol=1e-12)


def test_weight_decay_does_not_go_with_frozen_embeddings():
    with pytest.raises(ValidationError, match=r"weight_decay \(0\.1\) would shrink what freeze_embeddings freezes"):
        run_config(learner={"weight_decay": 0.1, "freeze_embeddings": True})
