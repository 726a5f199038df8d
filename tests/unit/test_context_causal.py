"""Context-causal attention: what decoding, training, likelihoods and the held-out KL see, against slow references."""

from itertools import permutations

import numpy as np
import pytest
import torch

from actors.evaluation.generation import load_student, sampler_of
from actors.evaluation.held_out import HeldOutSums, HeldOutTargets
from actors.evaluation.likelihood import Estimate, log_likelihoods
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.objective import ObjectiveConfig
from common.config.unmasking import DynamicUnmasking, StaticUnmasking
from common.conversion import convert_folder
from common.seeds import state_rng
from common.states import select_states
from common.student import attention_windows, hidden_states, load_model
from learner.batches import BatchBuilder
from tests.models import FAMILIES, tiny_family, tiny_qwen3
from tests.unit.test_parity import BLOCK, CPU, builder, revealed_alike, set_targets, trajectories


@pytest.fixture(scope="module", params=FAMILIES)
def student(request, tmp_path_factory):
    """Model and tokenizer of a student that was converted with context-causal attention."""
    folder = tmp_path_factory.mktemp(request.param)
    path = tiny_family(folder / "arlm", request.param)
    convert_folder(path, folder / "student", BLOCK, "<|mask|>", torch.float32, context="causal")
    return load_student(str(folder / "student"), "float32", "cpu")


def logits_of_last_block(model, ids: list[int], block_size: int = BLOCK) -> torch.Tensor:
    """float32 [positions of the last block, V]: one cacheless forward, masks written position by position: all blocks
    but the last are clean."""
    n = len(ids)
    start = (n - 1) // block_size * block_size
    masks = {}
    for kind, window in attention_windows(model.config).items():
        mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
        for q in range(n):
            for k in range(n):
                mask[0, 0, q, k] = (q >= start or k <= q) and (window is None or q - k < window)
        masks[kind] = mask
    of_layer = masks if len(masks) > 1 else next(iter(masks.values()))
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([ids]), torch.arange(n)[None], of_layer)
        return model.lm_head(hidden)[0, start:]


def test_the_checkpoint_says_so(student, tmp_path):
    model, tokenizer = student
    assert model.config.attention_context == "causal"
    assert sampler_of(model, tokenizer, block_size=None, slots=1).causal
    convert_folder(tiny_qwen3(tmp_path / "arlm"), tmp_path / "student", 4, "<|mask|>", torch.float32)
    plain = load_student(str(tmp_path / "student"), "float32", "cpu")
    assert plain[0].config.attention_context == "block"
    assert not sampler_of(*plain, block_size=None, slots=1).causal


def test_decoding_equals_a_cacheless_reference(student):
    """Greedy, one token a step, batched with prompts on and off the grid."""
    model, tokenizer = student
    mask_id = tokenizer.mask_token_id
    prompts = [np.random.default_rng(n).integers(5, 250, n) for n in (3, 9, 16)]
    sampler = sampler_of(model, tokenizer, block_size=None, slots=2)
    made = {
        t.ordinal: t
        for t in sampler.generate([Request(i, 0, p, 16) for i, p in enumerate(prompts)], Decoding(StaticUnmasking(), 0))
    }
    for ordinal, prompt in enumerate(prompts):
        ids = prompt.tolist()
        while len(ids) < len(made[ordinal].x0):
            start = len(ids) // BLOCK * BLOCK
            block = ids[start:] + [mask_id] * (BLOCK - len(ids) + start)
            while mask_id in block:
                p = logits_of_last_block(model, ids[:start] + block).softmax(-1)
                open_to = p.clone()
                open_to[:, [mask_id, *range(len(tokenizer), p.shape[1])]] = 0
                best = open_to.argmax(-1)
                surest = max((j for j, t in enumerate(block) if t == mask_id), key=lambda j: p[j, best[j]].item())
                block[surest] = int(best[surest])
            ids = ids[:start] + block
        assert made[ordinal].x0.tolist() == ids


@pytest.mark.parametrize("max_tokens", [4096, 64])
def test_parity(student, max_tokens):
    """At every visited state, the learner's log-probability of a revealed token is the sampler's confidence."""
    model, tokenizer = student
    rows = trajectories(model, tokenizer, DynamicUnmasking(threshold=0.05))
    objective = ObjectiveConfig(state={"kind": "all_rounds"})
    for t in rows:
        select_states(t, objective, BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    model.set_attn_implementation("sdpa")
    set_targets(model, rows)
    plain = builder(tokenizer, model)
    build = BatchBuilder(
        plain.meta, "row_mean", "bucket", max_tokens, "sdpa", CPU, plain.teacher_head,
        windows=attention_windows(model.config), context="causal",
    )  # fmt: skip
    batches, _ = build.update(rows, 0, 1)
    checked = clean = 0
    for micro in batches:
        x = build.tensors(micro, rows)
        with torch.no_grad():
            hidden = hidden_states(model, x.ids, x.positions, x.mask)
            log_p = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[x.loss_index]).log_softmax(-1)
            for doc in np.unique(micro.doc[micro.doc >= 0]):  # the clean part is the original's causal reading
                at = (micro.doc == doc) & (micro.copy == 0)
                if at.any():
                    causal = model.model(torch.from_numpy(micro.ids[at])[None]).last_hidden_state[0]
                    torch.testing.assert_close(hidden[torch.from_numpy(at)], causal, atol=1e-4, rtol=1e-4)
                    clean += int(at.sum())
        checked += revealed_alike(log_p, micro, rows)
    assert checked == sum(len(t.response_ids) for t in rows)
    assert clean > 0


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    model = load_model(tiny_qwen3(tmp_path_factory.mktemp("model"), seed=1), torch.float64, "sdpa")
    model.config.attention_context = "causal"
    return model.requires_grad_(False)


@pytest.mark.parametrize("context", [[9], [8, 3], [5, 6, 7, 8, 9]])
def test_the_likelihood_bound_is_the_mean_over_all_orders(qwen, context):
    mask, x, size = 262, [20, 30, 31, 12], 3
    orders = []
    for order in permutations(range(size)):
        total, grid = 0.0, -(-(len(context) + len(x)) // size) * size
        state = [*context, *[mask] * (grid - len(context))]
        for block in range(len(context) // size, grid // size):
            for position in (block * size + o for o in order):
                if len(context) <= position < len(context) + len(x):
                    logits = logits_of_last_block(qwen, state[: (block + 1) * size], size)[position - block * size]
                    logits[mask] = -torch.inf
                    token = x[position - len(context)]
                    total += logits.log_softmax(0)[token].item()
                    state[position] = token
        orders.append(total)
    (found,) = log_likelihoods(
        qwen, [(context, x)], block_size=size, mask_token_id=mask, estimate=Estimate("bound", samples=7)
    )
    assert found.log_prob == pytest.approx(np.mean(orders), abs=1e-6)


def test_the_held_out_kl_is_the_direct_one(qwen, tmp_path):
    original = load_model(tiny_qwen3(tmp_path, seed=2), torch.float64, "sdpa")
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, 256, n, dtype=np.int32) for n in sizes) for sizes in [(8, 8), (5, 3), (7, 9)]]
    expected = HeldOutSums.zeros(len(pairs), 4)
    for index, (prompt, response) in enumerate(pairs):
        x = [*prompt.tolist(), *response.tolist()]
        with torch.no_grad():
            p = original(input_ids=torch.tensor([x])).logits[0].softmax(-1)
        for begin in range(0, len(x), 4):
            state = x[:begin] + [x[i] if i < len(prompt) else 262 for i in range(begin, begin + 4)]
            log_q = logits_of_last_block(qwen, state, 4).log_softmax(-1)
            for i in range(max(begin, len(prompt)), min(begin + 4, len(x))):
                expected.kl[index, i - begin] += float((p[i - 1] * (p[i - 1].log() - log_q[i - begin])).sum())
    found = HeldOutTargets(original, pairs, rows=288).sums(qwen, block_size=4, mask_token_id=262)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-8)
