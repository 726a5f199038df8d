"""State selection by the student's own probabilities (LIFT): what is read, what stays masked, and the loss of it."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.config.objective import ObjectiveConfig
from common.config.unmasking import DynamicUnmasking
from common.seeds import state_rng
from common.states import kept_by_difficulty, select_states
from common.student import load_model, load_tokenizer
from common.trajectory import TrajectoryMeta
from learner.batches import BatchBuilder
from learner.difficulty import kept, label_logprobs
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3
from tests.reference import block_causal_logits
from tests.unit.test_config import run_config
from tests.unit.test_parity import BLOCK, CPU, trajectories
from tests.unit.test_training_loss import direct_loss, packed_loss

RHO = 0.25


def objective(ratio: float, keep: str = "by_ratio", scope: str = "sequence", **changes) -> ObjectiveConfig:
    masks = {"kind": "random", "scope": scope, "min_ratio": ratio, "max_ratio": ratio}
    state = {"kind": "lift", "masks": masks, "rho": RHO, "keep": keep}
    return ObjectiveConfig(**{"state": state, "target": {"kind": "hard"}, "weight": "inverse_t", **changes})


@pytest.fixture(scope="module")
def model_rows(tmp_path_factory):
    path = tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0)
    tokenizer = load_tokenizer(path)
    rows = trajectories(load_model(path, torch.float32, "sdpa"), tokenizer, DynamicUnmasking(threshold=0.05))
    return load_model(path, torch.float64, "sdpa"), tokenizer, rows


def selected(rows, tokenizer, chosen: ObjectiveConfig):
    for t in rows:
        select_states(t, chosen, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))


@pytest.mark.parametrize("scope", ["sequence", "block"])
@pytest.mark.parametrize(
    ("ratio", "keep", "which"),
    [
        (0.7, "by_ratio", "easiest"),
        (0.3, "by_ratio", "hardest"),
        (0.5, "by_ratio", "random"),
        (0.5, "easiest", "easiest"),
        (0.5, "hardest", "hardest"),
        (0.75, "random", "random"),
    ],
)
def test_what_stays_masked_is_that_of_the_paper(model_rows, scope, ratio, keep, which):
    _, tokenizer, rows = model_rows
    chosen = objective(ratio, keep, scope)
    selected(rows, tokenizer, chosen)
    any_order = []
    for t in rows:
        log_p = np.random.default_rng(t.ordinal).normal(size=len(t.target_offsets))
        before = dict(zip(t.target_offsets.tolist(), log_p.tolist(), strict=True))
        after = kept_by_difficulty(t, log_p, chosen, BLOCK, 0)
        left = set(after.masked_offsets[after.loss_weight > 0].tolist())
        block = (len(t.prompt_ids) + np.arange(len(t.reveal_round))) // BLOCK
        for b in set(block.tolist()) if scope == "block" else [None]:
            members = sorted((o for o in before if b is None or block[o] == b), key=before.__getitem__, reverse=True)
            if not members:
                continue
            n = max(1, round(len(members) * ratio / min(ratio + RHO, 1.0)))
            assert len(left & set(members)) == n
            if which == "easiest":
                assert left & set(members) == set(members[:n])
            if which == "hardest":
                assert left & set(members) == set(members[-n:])
            any_order.append(left & set(members) in (set(members[:n]), set(members[-n:])))
        np.testing.assert_allclose(after.loss_weight[after.loss_weight > 0], 1 / ratio, rtol=1e-6)
        kept_blocks = {int(block[o]) for o in left}
        assert {int(block[o]) for o in after.masked_offsets} == kept_blocks
        assert after.target_offsets is t.target_offsets
    assert which != "random" or not all(any_order)


@pytest.mark.parametrize("keep", ["easiest", "hardest"])
def test_the_loss_is_that_of_the_states_that_one_forward_has_chosen(model_rows, keep):
    """Two ranks, packed and in chunks, against forwards of plain sequences block by block, with the gradient."""
    model, tokenizer, rows = model_rows
    chosen = objective(0.5, keep)
    config = run_config(
        objective=chosen.model_dump(), learner={"logits_chunk_rows": 5}, data={"prompts": "p", "responses": "r"}
    )
    selected(rows, tokenizer, chosen)
    direct = []
    for t in rows:
        x0, prompt = t.x0.astype(np.int64), len(t.prompt_ids)
        masked = prompt + t.masked_offsets
        for o in t.target_offsets:
            b = (prompt + o) // BLOCK
            x = x0[: (b + 1) * BLOCK].copy()
            x[masked[masked // BLOCK == b]] = tokenizer.mask_token_id
            direct.append(block_causal_logits(model, x.tolist(), BLOCK)[prompt + o].log_softmax(-1)[x0[prompt + o]])
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test")
    build = BatchBuilder(meta, "row_mean", "bucket", 64, "sdpa", CPU, objective=chosen)
    module = TrainingModule(model, config)
    with torch.no_grad():
        found = sum(label_logprobs(rows, build, rank, 2, lambda batch: module(batch, None)) for rank in range(2))
    np.testing.assert_allclose(found, torch.stack(direct), rtol=1e-6)  # it is kept in float32

    states = kept(rows, found.numpy(), chosen, BLOCK, 0)
    assert sum(len(t.masked_offsets) for t in states) < sum(len(t.masked_offsets) for t in rows)
    model.zero_grad()
    fast = packed_loss(model, model, tokenizer, states, config)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    slow = direct_loss(model, model, states, tokenizer.mask_token_id, config)
    slow.backward()
    assert fast == pytest.approx(slow.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item())


def test_the_method_has_a_name_and_is_refused_with_another_weight():
    named = ObjectiveConfig(method="lift")
    assert (named.source.kind, named.state.kind, named.target.kind, named.weight) == (
        "offline", "lift", "hard", "inverse_t",
    )  # fmt: skip
    assert named.reads_difficulty
    with pytest.raises(ValidationError, match="method 'lift' means weight inverse_t, but it is 'one'"):
        ObjectiveConfig(method="lift", weight="one")
    ObjectiveConfig(state={"kind": "lift"}, source={"kind": "offline"})  # needs no rounds


def test_an_update_may_have_none_of_this_loss(model_rows):
    """As an extra loss while its weight is 0: it failed."""
    _, tokenizer, rows = model_rows
    chosen = objective(0.5)
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test")
    build = BatchBuilder.of(run_config(objective=chosen), meta, attention="sdpa", device=CPU)
    log_p = label_logprobs([], build, 0, 2, lambda batch: pytest.fail("nothing is read"))
    assert kept([], log_p.numpy(), chosen, BLOCK, 0) == []
    selected(rows[:1], tokenizer, chosen)
    n = int((rows[0].loss_weight > 0).sum())
    assert len(kept(rows[:1], np.zeros(n), chosen, BLOCK, 0)) == 1
