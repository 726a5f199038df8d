"""Invariants 1 and 2: the learner sees what the sampler saw, and its loss is Algorithm 1's."""

import numpy as np
import pytest
import torch

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.objective import ObjectiveConfig
from common.config.unmasking import DynamicUnmasking, StaticUnmasking
from common.seeds import state_rng
from common.states import select_states
from common.student import hidden_states, load_model, load_tokenizer
from common.trajectory import Trajectory, TrajectoryMeta
from learner.batches import BatchBuilder
from learner.objective import ChunkedDivergence, empty_sums
from tests.models import tiny_qwen3

BLOCK = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3(path, seed=0)
    return load_model(str(path), torch.float32, "sdpa"), load_tokenizer(str(path))


def trajectories(model, tokenizer, rule, count=8, slots=3, seed=3) -> list[Trajectory]:
    """Prompts on and off the block grid, more of them than slots."""
    sampler = Sampler(
        model,
        block_size=BLOCK,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        slots=slots,
        seed=seed,
    )
    rng = np.random.default_rng(0)
    lengths = [1, 3, 4, 5, 8, 9, 10, 16][:count]
    prompts = [rng.integers(5, len(tokenizer) - 5, size=n) for n in lengths]
    requests = [Request(i, 0, p, 14) for i, p in enumerate(prompts)]
    return sorted(sampler.generate(requests, Decoding(rule, 1.0)), key=lambda t: t.ordinal)


def builder(tokenizer, model, attention="sdpa", max_tokens=4096, normalization="row_mean", target_kind="hidden"):
    meta = TrajectoryMeta(BLOCK, tokenizer.mask_token_id, "test", target_kind, model.config.hidden_size)
    head = model.get_output_embeddings().weight.detach()
    return BatchBuilder(meta, normalization, "bucket", max_tokens, attention, CPU, head)


def set_targets(model, rows) -> None:
    """The teacher: one causal pass over prompt + response per trajectory."""
    with torch.no_grad():
        for t in rows:
            ids = torch.from_numpy(t.causal_ids.astype(np.int64))[None]
            hidden = model.model(ids).last_hidden_state[0]
            t.hidden = hidden[len(t.prompt_ids) - 1 + t.target_offsets].numpy().ravel()


@pytest.mark.parametrize("rule", [StaticUnmasking(), DynamicUnmasking(threshold=0.05)])
@pytest.mark.parametrize("max_tokens", [4096, 64])
def test_learner_log_probabilities_equal_the_samplers(model_and_tokenizer, rule, max_tokens):
    model, tokenizer = model_and_tokenizer
    rows = trajectories(model, tokenizer, rule)
    objective = ObjectiveConfig(state={"kind": "all_rounds"})
    for t in rows:
        select_states(t, objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    set_targets(model, rows)
    build = builder(tokenizer, model, max_tokens=max_tokens)
    batches, _ = build.update(rows, 0, 1)
    checked = 0
    for micro in batches:
        tensors = build.tensors(micro, rows)
        with torch.no_grad():
            hidden = hidden_states(model, tensors.ids, tensors.positions, tensors.mask)
            logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[tensors.loss_index])
        log_p = logits.log_softmax(-1)
        copies = micro.copy.ravel()[micro.loss_index] - 1
        positions = micro.positions.ravel()[micro.loss_index]
        for i, (doc, state, position) in enumerate(zip(micro.loss_doc, copies, positions, strict=True)):
            t = rows[doc]
            offset = position - len(t.prompt_ids)
            if t.reveal_round[offset] == state:  # revealed from this very state: its confidence is known
                checked += 1
                assert log_p[i, t.response_ids[offset]].item() == pytest.approx(
                    float(np.log(t.confidence[offset])), abs=1e-4
                )
    assert checked == sum(len(t.response_ids) for t in rows)


@pytest.mark.parametrize("kind", ["per_block", "global", "all_rounds", "random"])
def test_packed_loss_equals_direct_loop(model_and_tokenizer, kind):
    """Packed, masked-only, chunked loss and gradient = a loop over rows, states, blocks and positions."""
    model, tokenizer = model_and_tokenizer
    rows = trajectories(model, tokenizer, DynamicUnmasking(threshold=0.05))
    objective = ObjectiveConfig(state={"kind": kind})
    for t in rows:
        select_states(t, objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    set_targets(model, rows)

    model.zero_grad()
    fast = 0.0
    build = builder(tokenizer, model, max_tokens=256)
    for rank in range(2):  # two ranks' shares add up to the update
        batches, _ = build.update(rows, rank, 2)
        for micro in batches:
            x = build.tensors(micro, rows)
            hidden = hidden_states(model, x.ids, x.positions, x.mask)
            loss = ChunkedDivergence.apply(
                hidden.reshape(-1, hidden.shape[-1])[x.loss_index],
                model.lm_head.weight,
                x.target,
                x.coefficient,
                objective.divergence,
                5,
                empty_sums(CPU),
            )
            loss.backward()
            fast += loss.item()
    fast_gradient = {n: p.grad.clone() for n, p in model.named_parameters()}

    model.zero_grad()
    slow = direct_loss(model, rows, tokenizer.mask_token_id)
    slow.backward()
    assert fast == pytest.approx(slow.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fast_gradient[name], parameter.grad, atol=2e-5, rtol=1e-3)


def direct_loss(model, rows, mask_token_id, hard=False):
    """Section 2's double sum, one block at a time: clean prefix, then the noised block, on a plain sequence."""
    losses = []
    for t in rows:
        x0, prompt = t.x0.astype(np.int64), len(t.prompt_ids)
        with torch.no_grad():
            teacher = model(torch.from_numpy(t.causal_ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
        terms = []
        for state in range(t.state_count):
            chosen = t.masked_state == state
            masked = prompt + t.masked_offsets[chosen]
            trained = dict(zip(masked.tolist(), t.loss_weight[chosen].tolist(), strict=True))
            for b in np.unique(masked // BLOCK):
                x = x0[: (b + 1) * BLOCK].copy()
                inside = masked[masked // BLOCK == b]
                x[inside] = mask_token_id
                n = len(x)
                blocks = torch.arange(n) // BLOCK
                mask = (blocks[None, :] <= blocks[:, None])[None, None]
                log_p = model(torch.from_numpy(x)[None], attention_mask=mask).logits[0].log_softmax(-1)
                for i in inside.tolist():
                    if trained[i] > 0:
                        target = teacher[i - 1]
                        kl = -log_p[i, x0[i]] if hard else (target.exp() * (target - log_p[i])).sum()
                        terms.append(trained[i] * kl)
        if terms:
            losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


def revealed_alike(log_p, micro, rows) -> int:
    """Asserts that the learner's log-probabilities [L, V] of what the states of a micro-batch reveal next are
    the sampler's confidences; returns how many there are."""
    states = micro.copy.ravel()[micro.loss_index] - 1
    positions = micro.positions.ravel()[micro.loss_index]
    checked = 0
    for i, (doc, state, position) in enumerate(zip(micro.loss_doc, states, positions, strict=True)):
        t = rows[doc]
        offset = position - len(t.prompt_ids)
        if t.reveal_round[offset] == state:
            checked += 1
            expected = float(np.log(t.confidence[offset]))
            assert log_p[i, t.response_ids[offset]].item() == pytest.approx(expected, abs=1e-4)
    return checked
