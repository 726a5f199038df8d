"""Every supported family, tiny and random: conversion, sampler against a reference, parity, and a few updates."""

import numpy as np
import pytest
import torch

from actors.sampler.request import Request
from actors.sampler.sampler import Sampler
from actors.sampler.sampling import Decoding
from common.config.objective import ObjectiveConfig
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert_folder
from common.seeds import state_rng
from common.states import select_states
from common.student import attention_windows, hidden_states, load_model, load_tokenizer
from learner.batches import BatchBuilder
from learner.objective import ChunkedDivergence, empty_sums
from tests.models import FAMILIES, tiny_family
from tests.unit.test_parity import BLOCK, CPU, builder, revealed_alike, set_targets, trajectories


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen3-moe"])
def family(request, tmp_path_factory):
    """Name, model and tokenizer of a converted student."""
    folder = tmp_path_factory.mktemp(request.param)
    path = tiny_family(folder / "arlm", request.param)
    convert_folder(path, folder / "student", BLOCK, "<|mask|>", torch.float32)
    model = load_model(str(folder / "student"), torch.float32, "sdpa")
    return request.param, model, load_tokenizer(str(folder / "student")), path


def test_conversion_changes_no_weight(family):
    _, student, tokenizer, path = family
    assert (student.config.block_size, student.config.mask_token_id) == (BLOCK, tokenizer.mask_token_id)
    arlm = load_model(path, torch.float32, "sdpa")
    for (name, a), b in zip(arlm.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_windows(family):
    name, model, _, _ = family
    expected = {
        "qwen2-sliding": {"full_attention": None, "sliding_attention": 6},
        "mistral-sliding": {"sliding_attention": 6},
        "gemma3": {"full_attention": None, "sliding_attention": 6},
    }
    assert attention_windows(model.config) == expected.get(name, {"full_attention": None})


def cacheless_logits(model, ids: list[int]) -> torch.Tensor:
    """float32 [N, V]: one forward over the whole sequence, each layer's mask written position by position."""
    n = len(ids)
    masks = {}
    for kind, window in attention_windows(model.config).items():
        mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
        for q in range(n):
            for k in range(n):
                mask[0, 0, q, k] = k // BLOCK <= q // BLOCK and (window is None or q - k < window)
        masks[kind] = mask
    of_layer = masks if len(masks) > 1 else next(iter(masks.values()))
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([ids]), torch.arange(n)[None], of_layer)
        return model.lm_head(hidden)[0]


def test_sampler_equals_a_cacheless_reference(family):
    """Greedy, one token a step: the most confident masked position of a block is revealed until none is left."""
    _, model, tokenizer, path = family
    mask_id, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    for length in (3, 9, 16):
        prompt = np.random.default_rng(length).integers(5, 250, length).tolist()
        sampler = Sampler(
            load_model(path, torch.float32, "sdpa"),
            block_size=BLOCK, mask_token_id=mask_id, eos_token_id=eos, slots=2, seed=0,
        )  # fmt: skip
        (made,) = sampler.generate([Request(0, 0, np.array(prompt, np.int32), 16)], Decoding(DynamicUnmasking(), 0.0))
        ids = list(prompt)
        while len(ids) < len(made.x0):
            start = len(ids) // BLOCK * BLOCK
            block = ids[start:] + [mask_id] * (BLOCK - len(ids) + start)
            while mask_id in block:
                p = cacheless_logits(model, ids[:start] + block)[start:].softmax(-1)
                open_to = p.clone()
                open_to[:, mask_id] = 0
                best = open_to.argmax(-1)
                sure = {j: p[j, best[j]].item() for j, token in enumerate(block) if token == mask_id}
                surest = max(sure, key=lambda j: sure[j])
                for j in {surest, *[j for j, c in sure.items() if c > 0.9]}:
                    block[j] = int(best[j])
            ids = ids[:start] + block
        assert made.x0.tolist() == ids


def test_parity(family):
    """At every visited state, the learner's log-probability of a revealed token is the sampler's confidence."""
    _, model, tokenizer, path = family
    rows = trajectories(load_model(path, torch.float32, "sdpa"), tokenizer, DynamicUnmasking(threshold=0.05))
    for t in rows:
        select_states(
            t, ObjectiveConfig(state={"kind": "all_rounds"}), BLOCK, tokenizer.eos_token_id, np.random.default_rng(0)
        )
    set_targets(model, rows)
    build = packer(model, tokenizer)
    batches, _ = build.update(rows, 0, 1)
    checked = 0
    for micro in batches:
        x = build.tensors(micro, rows)
        with torch.no_grad():
            hidden = hidden_states(model, x.ids, x.positions, x.mask)
            log_p = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[x.loss_index]).log_softmax(-1)
        checked += revealed_alike(log_p, micro, rows)
    assert checked == sum(len(t.response_ids) for t in rows)


def test_training_lowers_the_divergence(family):
    _, student, tokenizer, path = family
    model = load_model(path, torch.float32, "sdpa")
    rows = trajectories(load_model(path, torch.float32, "sdpa"), tokenizer, DynamicUnmasking(threshold=0.05))
    for t in rows:
        select_states(t, ObjectiveConfig(), BLOCK, tokenizer.eos_token_id, state_rng(0, t.ordinal, 0))
    set_targets(student, rows)
    build = packer(student, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        total = 0.0
        batches, _ = build.update(rows, 0, 1)
        for micro in batches:
            x = build.tensors(micro, rows)
            hidden = hidden_states(model, x.ids, x.positions, x.mask)
            loss = ChunkedDivergence.apply(
                hidden.reshape(-1, hidden.shape[-1])[x.loss_index], model.lm_head.weight, x.target, x.coefficient,
                ObjectiveConfig().divergence, 64, empty_sums(CPU),
            )  # fmt: skip
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses[-1] < 0.7 * losses[0]


def packer(model, tokenizer) -> BatchBuilder:
    plain = builder(tokenizer, model)
    return BatchBuilder(
        plain.meta, "row_mean", "bucket", 256, "sdpa", CPU, plain.teacher_head.clone(),
        windows=attention_windows(model.config),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"head_dim": 32}, "soft-caps its logits"),
        ("gpt2", {"n_embd": 64, "n_head": 2, "n_layer": 2}, "model_type 'gpt2', which is not supported"),
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 64}, "is not supported"),
    ],
)
def test_a_family_that_cannot_be_right_is_refused(tmp_path, family, changes, message):
    path = tiny_family(tmp_path, family, **changes)
    with pytest.raises(ValueError, match=message):
        convert_folder(path, tmp_path / "student", BLOCK, "<|mask|>", torch.float32)
