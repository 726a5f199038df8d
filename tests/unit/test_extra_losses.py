"""Sums of losses: each part has trajectories, states, target and divergence of its own; their gradients add up."""

import json
import re
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.rollout import RolloutActor
from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.objective import MOST_EXTRA, ObjectiveConfig
from common.config.unmasking import DynamicUnmasking
from common.prompts import Prompt, longest_response
from common.responses import for_extra_losses, offline_trajectory, with_prefixes, with_responses
from common.seeds import state_rng
from common.states import select_states
from common.student import load_model, load_tokenizer
from common.trajectory import TrajectoryMeta, from_batch
from deploy.curriculum import extra_weights
from deploy.monitoring.metrics import METRICS
from learner.batches import BatchBuilder, update_shares
from learner.objective import empty_sums
from learner.rank import part_metrics
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3
from tests.unit.test_config import run_config
from tests.unit.test_parity import BLOCK, CPU, set_targets, trajectories
from tests.unit.test_training_loss import direct_loss

OFFLINE = {"source": {"kind": "offline"}, "state": {"kind": "random"}}
EXTRA = [
    {**OFFLINE, "target": {"kind": "hard"}, "position_weight": "inverse_t", "weight": 0.3},
    {"state": {"kind": "all_rounds"}, "divergence": {"kind": "reverse_kl"}, "weight": 0.5},
    {**OFFLINE, "weight": 0.0},
]
DATA = {"prompts": "p", "responses": "r"}


def test_the_gradient_is_the_sum_of_the_gradients_of_single_losses(tmp_path):
    """In float64, over two updates and two ranks, against forwards of plain sequences for each loss alone."""
    paths = [tiny_qwen3(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    student, teacher = (load_model(path, torch.float64, "sdpa") for path in paths)
    teacher.requires_grad_(False)
    tokenizer = load_tokenizer(paths[0])
    sampled = load_model(paths[0], torch.float32, "sdpa")
    main_terms = {"terms": {"sharpening": 0.2}, "clip_nats": 3.0, "normalization": "row_sum"}
    config = run_config(objective={**main_terms, "extra": EXTRA}, data=DATA, learner={"logits_chunk_rows": 5})
    rule, end = DynamicUnmasking(threshold=0.05), tokenizer.eos_token_id
    main = trajectories(sampled, tokenizer, rule, count=4)
    again = trajectories(sampled, tokenizer, rule, count=4, seed=8)
    for t in again:
        t.sample = 2
    prompts = [Prompt(t.ordinal, "q", t.prompt_ids, responses=(t.response_ids,), first_sample=1) for t in again]
    offline = [offline_trajectory(p, 0, 14, BLOCK, tokenizer.mask_token_id, end) for p in prompts]
    rows = sorted(chain(main, again, offline), key=lambda t: (t.ordinal, t.sample))
    parts = config.objective.parts
    for t in rows:
        select_states(t, parts[t.sample], BLOCK, end, state_rng(0, t.ordinal, t.sample))
    set_targets(teacher, rows)

    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test", config.target_kind, student.config.hidden_size)
    first = BatchBuilder(meta, "row_sum", "bucket", 64, "sdpa", CPU, teacher.lm_head.weight, objective=config.objective)
    weights = extra_weights(config.objective, 0)
    builders = [first, *(replace(first, objective=p, scale=w) for p, w in zip(parts[1:], weights, strict=True))]
    module = TrainingModule(student, config)
    for number, share in enumerate(update_shares(rows, len(parts), samples=1, rows=2)):
        student.zero_grad()
        losses = []
        for own, builder in zip(share, builders, strict=True):
            sums = empty_sums(CPU)
            for rank in range(2):
                for micro in builder.update(own, rank, 2)[0]:
                    module(builder.tensors(micro, own), sums).backward()
            losses.append(sums.loss.item())
        together = {name: p.grad.clone() for name, p in student.named_parameters()}
        student.zero_grad()
        of_update = [2 * number, 2 * number + 1]
        for part, weight, loss in zip(parts, (1.0, *weights), losses, strict=True):
            single = run_config(objective=part.model_dump(), data=DATA)
            own = [t for t in rows if t.ordinal in of_update and t.sample == parts.index(part)]
            if not own:
                assert (weight, loss) == (0.0, 0.0)
                continue
            slow = weight * direct_loss(student, teacher, own, tokenizer.mask_token_id, single)
            slow.backward()
            assert loss == pytest.approx(slow.item(), rel=1e-6)
        for name, p in student.named_parameters():
            torch.testing.assert_close(together[name], p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item())


def test_every_loss_has_samples_of_its_own_and_none_where_its_weight_is_0():
    objective = ObjectiveConfig(extra=EXTRA)
    prompts = [Prompt(i, f"q{i}", np.zeros(3, np.int32)) for i in range(3)]
    responses = {p.question: [np.arange(n, dtype=np.int32) for n in (4, 5)] for p in prompts}
    more = for_extra_losses(prompts, objective, extra_weights(objective, 0), responses, samples=2, seed=0, longest=len)
    assert [(p.ordinal, list(p.samples(2)), len(p.responses)) for p in more] == [
        *((i, [2, 3], 2) for i in range(3)),
        *((i, [4, 5], 0) for i in range(3)),
    ]
    (offline,) = with_responses(more[:1], 1.0, responses, 2, 0)
    assert [offline_trajectory(offline, s, 8, BLOCK, 99, 1).sample for s in range(2)] == [2, 3]


def test_rollouts_go_on_with_a_prefix_of_a_response():
    """A uniform share of the response and of what the prompt may have, the same for all samples; one token is left."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, f"q{i}", np.arange(3 + i % 5, dtype=np.int32), "math") for i in range(400)]
    known = {p.question: [rng.integers(100, 200, n).astype(np.int32) for n in (1, 9, 30)] for p in prompts}
    caps = {"math": 20}

    def longest(prompt: Prompt) -> int:
        return longest_response(prompt, 64, caps, BLOCK)

    begun = with_prefixes(prompts, 0.8, known, longest, seed=1)
    again = with_prefixes(prompts, 0.8, known, longest, seed=1)
    assert [p.ids.tolist() for p in begun] == [p.ids.tolist() for p in again]
    shares = []
    for before, after in zip(prompts, begun, strict=True):
        n = len(before.ids)
        assert after.ids[:n].tolist() == before.ids.tolist() and len(after.ids) == n + after.begun
        (of,) = [r for r in known[before.question] if r[: after.begun].tolist() == after.ids[n:].tolist()][:1]
        # prompt, prefix and the rest end where prompt and response would
        assert len(after.ids) + longest(after) == n + longest(before) and longest(after) >= 1
        if len(of) == 30 and after.begun:
            shares.append(after.begun / longest(before))
    assert max(shares) < 0.8 and 0.3 < np.mean(shares) < 0.5
    assert {p.begun for p in with_prefixes(prompts, 0.01, known, longest, seed=1)} == {0}


def test_an_extra_loss_goes_on_with_prefixes_and_trains_what_the_student_writes(tmp_path):
    """TrOPD's guidance through a rollout actor: the prefix is context, and has neither rounds nor targets."""
    path = tiny_qwen3(tmp_path, seed=0)
    extra = [{"source": {"kind": "continued"}, "weight": 0.001, "schedule": "cosine", "end": 0.0, "batches": 4}]
    data = ["--model.path", path, "--data.responses", "r.parquet"]
    config = load_config("tiny", [*data, "--objective.method", "tropd", "--objective.extra", json.dumps(extra)])
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, f"q{i}", rng.integers(10, 200, 5 + i).astype(np.int32)) for i in range(6)]
    known = {p.question: [rng.integers(10, 200, 12).astype(np.int32)] for p in prompts}

    def longest(prompt: Prompt) -> int:
        return longest_response(prompt, 16, {}, BLOCK)

    weights = extra_weights(config.objective, 0)
    more = for_extra_losses(prompts, config.objective, weights, known, 1, config.seed, longest)
    assert sum(p.begun for p in more) > 10
    streamed = list(RolloutActor(config, 0).rollout([*prompts, *more], 16, BLOCK, DynamicUnmasking(threshold=0.05)))
    rows = {(t.ordinal, t.sample): t for batch in streamed[::2] for t in from_batch(batch)[0]}
    assert len(rows) == 12
    for prompt in more:
        t, plain = rows[prompt.ordinal, 1], rows[prompt.ordinal, 0]
        assert t.prompt_ids.tolist() == [*plain.prompt_ids, *known[prompt.question][0][: prompt.begun]]
        assert len(t.x0) <= len(plain.prompt_ids) + longest(prompts[prompt.ordinal])
        assert t.weights_version == 0 and not t.is_offline
        assert t.reveal_round.min() == 0 and len(t.target_offsets)


def test_prefixes_need_responses():
    with pytest.raises(ConfigError, match=r"objective\.extra\.0\.source\.kind 'continued' needs offline responses"):
        load_config("tiny", ["--objective.extra", '[{"source": {"kind": "continued"}}]'])


def test_weights_follow_their_schedules():
    extra = [
        {"weight": 0.2},
        {"weight": 0.001, "schedule": "cosine", "end": 0.0, "batches": 10},
        {"weight": 0.0, "schedule": "linear", "end": 1.0, "batches": 4},
    ]
    objective = ObjectiveConfig(extra=extra)
    assert [extra_weights(objective, batch) for batch in (0, 5, 10, 99)] == [
        pytest.approx(expected)
        for expected in [(0.2, 0.001, 0.0), (0.2, 0.0005, 1.0), (0.2, 0.0, 1.0), (0.2, 0.0, 1.0)]
    ]


def test_each_part_is_a_metric_of_its_own():
    totals = {"loss": 3.0, "positions": 4.0, "loss/1": 1.0, "divergence/1": 6.0, "positions/1": 3.0}
    assert part_metrics(totals, 2, updates=2) == {"part/0/loss": 1.5, "part/1/loss": 0.5, "part/1/kl": 2.0}
    assert part_metrics(totals, 1, updates=2) == {}
    every = {f"{name}/{i}": 1.0 for i in range(1, MOST_EXTRA + 1) for name in ("loss", "divergence", "positions")}
    named = part_metrics(totals | every, MOST_EXTRA + 1, updates=1)
    assert named.keys() == {name for name in METRICS if name.startswith("part/")}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"source": {"kind": "offline"}}, r"extra\.1\.source\.kind 'offline' has no realised rounds"),
        (
            {"target": {"kind": "hard"}, "divergence": {"kind": "reverse_kl"}},
            r"extra\.1\.divergence\.kind 'reverse_kl' .* is infinite",
        ),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused_by_its_place(extra, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig(extra=[{}, extra])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            '[{"source": {"kind": "offlin"}}]',
            "extra.0.source.kind: 'offlin' is unknown, did you mean 'offline'",
        ),
        (
            '[{}, {"divergence": {"kind": "kl"}}]',
            "extra.1.divergence.kind: 'kl' is unknown; choose forward_kl, ",
        ),
        ('[{"weigt": 1}]', "objective.extra.0.weigt: unknown field (value 1); did you mean objective.extra.0.weight?"),
        ('[{"weight": -1}]', "objective.extra.0.weight: -1 is not accepted, it should be greater than or equal to 0"),
        (f"[{'{}, ' * MOST_EXTRA}{{}}]", "objective.extra: "),
    ],
)
def test_wrong_fields_are_named_by_their_place(extra, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config("tiny", ["--objective.extra", extra])


def test_what_a_run_needs_is_what_any_of_its_losses_needs():
    with pytest.raises(ValidationError, match=r"objective\.extra\.0\.source\.kind 'offline' needs offline responses"):
        run_config(objective={"extra": [OFFLINE]})
    with pytest.raises(ValidationError, match=r"objective\.extra\.0\.target\.top_k \(0\)"):
        run_config(
            objective={"extra": [{"target": {"kind": "teacher", "temperature": 0.5}}]}, teacher={"target": "topk"}
        )
    sft = {"method": "sft"}
    assert run_config(objective=sft, data=DATA).target_kind == "none"
    assert run_config(objective={**sft, "extra": [{"weight": 0.1}]}, data=DATA).target_kind == "hidden"
