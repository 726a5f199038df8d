"""Rollouts of an earlier run as a source: their rounds come back from the spool, and windows are rounds of a block."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from common.config.objective import ObjectiveConfig
from common.config.terms import ExtraTerms
from common.config.unmasking import DynamicUnmasking
from common.datasets.errors import PromptError
from common.prompts import Prompt
from common.responses import load_trajectories, offline_share, offline_trajectory, with_responses
from common.seeds import state_rng
from common.states import select_states
from common.student import load_model, load_tokenizer
from common.trajectory import REPLAYED, TrajectoryMeta, batch_info, to_batch, write_spool
from common.trajectory_checks import check_batch
from learner.batches import BatchBuilder
from learner.objective import empty_sums
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3
from tests.unit.test_config import run_config
from tests.unit.test_parity import BLOCK, CPU, trajectories


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0)
    return load_model(path, torch.float64, "sdpa"), load_tokenizer(path)


@pytest.fixture(scope="module")
def rollouts(models):
    model, tokenizer = models
    return trajectories(model.float(), tokenizer, DynamicUnmasking(threshold=0.05))


def spooled(folder, tokenizer, rows):
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test")
    for i, part in enumerate((rows[:3], rows[3:])):
        write_spool(folder / f"batch-{i:06d}.arrow", [to_batch(part, meta)])
    return meta


def test_what_the_spool_holds_comes_back_with_its_rounds(tmp_path, models, rollouts):
    """The same states are selected; a cut ends with a block."""
    model, tokenizer = models
    rows = [replace(t) for t in rollouts]
    meta = spooled(tmp_path, tokenizer, rows)
    prompts = [Prompt(7 + t.ordinal, f"q{t.ordinal}", t.prompt_ids) for t in rows]
    expected = {"block_size": BLOCK, "tokenizer_fingerprint": "test"}
    known = load_trajectories(str(tmp_path), prompts, model.config.vocab_size, **expected)
    objective = ObjectiveConfig(method="tabom")
    chosen = with_responses(prompts, offline_share(objective.source, 0), known, 1, seed=0)
    made = [offline_trajectory(p, 0, 100, BLOCK, tokenizer.mask_token_id, tokenizer.eos_token_id) for p in chosen]
    for again, t in zip(made, rows, strict=True):
        assert again.x0.tolist() == t.x0.tolist() and len(again.response_ids) == len(t.response_ids)
        assert again.reveal_round.tolist() == t.reveal_round.tolist()
        assert (again.ordinal, again.weights_version, again.finish_reason) == (t.ordinal + 7, REPLAYED, t.finish_reason)
        for each in (again, t):
            select_states(each, objective, BLOCK, tokenizer.eos_token_id, state_rng(0, 1, 0))
        assert again.masked_offsets.tolist() == t.masked_offsets.tolist()
    batch = to_batch(made, meta)
    check_batch(batch, model.config.vocab_size)
    assert (batch_info(batch).oldest_version, batch_info(batch).rollout_tokens) == (None, 0)

    long = next(i for i, t in enumerate(rows) if len(t.response_ids) > 8)
    limit = 8 - len(rows[long].prompt_ids) % BLOCK
    cut = offline_trajectory(chosen[long], 0, limit, BLOCK, tokenizer.mask_token_id, tokenizer.eos_token_id)
    assert cut.response_ids.tolist() == rows[long].response_ids[:limit].tolist() and not len(cut.tail_ids)
    assert (cut.reveal_round.tolist(), cut.finish_reason) == (rows[long].reveal_round[:limit].tolist(), "length")
    check_batch(to_batch([cut], meta), model.config.vocab_size)


def test_a_spool_of_another_run_is_refused(tmp_path, models, rollouts):
    model, tokenizer = models
    spooled(tmp_path, tokenizer, rollouts)
    prompts = [Prompt(t.ordinal, f"q{t.ordinal}", t.prompt_ids) for t in rollouts]
    vocabulary = model.config.vocab_size
    with pytest.raises(PromptError, match=r"batch-000000\.arrow': trajectory batch has block_size 4, this run needs 8"):
        load_trajectories(str(tmp_path), prompts, vocabulary, block_size=8)
    other = Prompt(99, "another", np.array([5, 6], np.int32))
    with pytest.raises(PromptError, match="1 of 9 prompts have no rollout there, the first is 'another'"):
        load_trajectories(str(tmp_path), [*prompts, other], vocabulary)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match=r"has no \.arrow file; give a folder that pipeline\.spool wrote"):
        load_trajectories(str(tmp_path / "empty"), prompts, vocabulary)
    (tmp_path / "empty" / "damaged.arrow").write_bytes(b"no arrow")
    with pytest.raises(PromptError, match="is no whole Arrow IPC file"):
        load_trajectories(str(tmp_path / "empty"), prompts, vocabulary)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("kind", ["per_block", "global", "all_rounds"])
def test_a_window_trains_the_first_rounds_of_a_state_alone(models, rollouts, kind, window):
    """What is masked is the same as without a window, in the blocks that train anything."""
    _, tokenizer = models
    later = 0
    for t in rollouts:
        whole, part = replace(t), replace(t)
        for each, size in ((whole, 0), (part, window)):
            objective = ObjectiveConfig(state={"kind": kind, "window": size})
            select_states(each, objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
        expected = {}  # (state, offset): trained
        for state in range(whole.state_count):
            masked = whole.masked_offsets[whole.masked_state == state]
            block = (len(t.prompt_ids) + masked) // BLOCK
            for b in np.unique(block):
                inside = masked[block == b]
                first = t.reveal_round[inside].min()
                trained = (inside < len(t.response_ids)) & (t.reveal_round[inside] < first + window)
                if trained.any():
                    expected |= {(state, o): bool(w) for o, w in zip(inside.tolist(), trained.tolist(), strict=True)}
        got = zip(part.masked_state.tolist(), part.masked_offsets.tolist(), part.loss_weight > 0, strict=True)
        assert {(s, o): bool(w) for s, o, w in got} == expected
        later += sum(not w for w in expected.values())
    assert later > 0 or window == 3


def test_tabom_is_its_formula_in_float64(models, rollouts):
    """Cross-entropy of the window and the ranked pairs of its first rounds, with gradient, by a loop over blocks."""
    student, tokenizer = models
    student = student.double()
    rows = [replace(t, ordinal=i, sample=0) for i, t in enumerate(rollouts)]
    terms = {"rank": 1.5, "rank_margin": 0.2, "rank_window": 2}
    chosen = {"method": "tabom", "source": {"kind": "student"}, "terms": terms, "normalization": "sum"}
    config = run_config(objective={**chosen, "state": {"kind": "all_rounds", "window": 3}})
    for t in rows:
        select_states(t, config.objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test")
    builder = BatchBuilder.of(config, meta, attention="sdpa", device=CPU)
    module, sums = TrainingModule(student, config), empty_sums(CPU)
    student.zero_grad()
    for micro in builder.update(rows, 0, 1)[0]:
        module(builder.tensors(micro, rows), sums).backward()
    fast = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    slow, pairs = torch.zeros((), dtype=torch.float64), 0
    for t in rows:
        for s in range(t.state_count):
            of_state = t.masked_state == s
            masked, weight = len(t.prompt_ids) + t.masked_offsets[of_state], t.loss_weight[of_state]
            for b in np.unique(masked // BLOCK):
                x = t.x0[: (b + 1) * BLOCK].astype(np.int64)
                inside = masked // BLOCK == b
                x[masked[inside]] = tokenizer.mask_token_id
                blocks = torch.arange(len(x)) // BLOCK
                mask = (blocks[None, :] <= blocks[:, None])[None, None]
                log_p = student(torch.from_numpy(x)[None], attention_mask=mask).logits[0].log_softmax(-1)
                trained = masked[inside & (weight > 0)]
                entropy = {i: -(log_p[i].exp() * log_p[i]).sum() for i in trained.tolist()}
                slow = slow - sum(log_p[i, t.x0[i]] for i in trained.tolist())
                rounds = {i: int(t.reveal_round[i - len(t.prompt_ids)]) for i in trained.tolist()}
                near = [i for i in entropy if rounds[i] < min(rounds.values()) + 2]
                hinges = [
                    (entropy[i] - entropy[j] + 0.2).clamp_min(0) for i in near for j in near if rounds[i] < rounds[j]
                ]
                pairs += len(hinges)
                if hinges:
                    slow = slow + 1.5 * len(trained) * torch.stack(hinges).mean()
    slow.backward()
    assert pairs > 0 and sums.loss.item() == pytest.approx(slow.item(), rel=1e-6)
    for name, p in student.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item())


def test_tabom_by_name():
    named = ObjectiveConfig(method="tabom", terms={"rank_margin": 0.3})
    assert (named.source.kind, named.state.kind, named.target.kind) == ("replay", "per_block", "hard")
    assert named.terms == ExtraTerms(rank=1.0, rank_margin=0.3)
    with pytest.raises(ValidationError, match=r"method 'tabom' means target\.kind hard, but it is 'teacher'"):
        ObjectiveConfig(method="tabom", target={"kind": "teacher"})
    with pytest.raises(ValidationError, match=r"terms\.rank_window \(8\) is above state\.window \(4\)"):
        ObjectiveConfig(state={"kind": "global", "window": 4}, terms={"rank": 1, "rank_window": 8})
    with pytest.raises(ValidationError, match=r"'replay' needs trajectories: set data\.trajectories to the folder"):
        run_config(objective={"method": "tabom"})
    with pytest.raises(ValidationError, match=r"'replay' has rounds of one block size, but block_growth\.kind is"):
        run_config(
            objective={"extra": [{"source": {"kind": "replay"}}]},
            data={"prompts": "p", "trajectories": "t"},
            block_growth={"kind": "steps", "sizes": [8], "at_batches": [1]},
        )
