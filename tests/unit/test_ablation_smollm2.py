"""The arms of the ablation on a real model: each has a config that is accepted, and a loss that a tiny model learns."""

import numpy as np
import pytest
import torch

from common.config.unmasking import DynamicUnmasking
from common.conversion import TeacherHead
from common.prompts import Prompt
from common.responses import offline_trajectory
from common.seeds import state_rng
from common.states import NoiseTokens, select_states
from common.student import load_model, load_tokenizer
from common.trajectory import TrajectoryMeta
from deploy.ablation.runs import Arm, arms_of, load_ablation
from deploy.curriculum import extra_weights
from learner.alignment import LayerAlignment
from learner.batches import BatchBuilder, of_heads, update_shares
from learner.difficulty import kept, label_logprobs
from learner.objective import empty_sums
from learner.training_module import TrainingModule
from tests.models import tiny_qwen3
from tests.unit.test_parity import CPU, set_targets, trajectories
from tests.unit.test_training_loss import K, set_topk

FILE = "ablation-smollm2"
ARMS = list(load_ablation(FILE).arms)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    paths = [tiny_qwen3(tmp_path_factory.mktemp("models") / str(seed), seed=seed) for seed in (0, 1)]
    student, teacher = (load_model(path, torch.float32, "sdpa") for path in paths)
    return student, teacher.requires_grad_(False), load_tokenizer(paths[0])


@pytest.fixture(scope="module")
def runs() -> list[Arm]:
    return arms_of(load_ablation(FILE))


def test_the_papers_methods_have_three_seeds_and_the_others_one(runs):
    seeds = {name: [arm.seed for arm in runs if arm.name == name] for name in ARMS}
    three = [name for name, each in seeds.items() if each == [0, 1, 2]]
    assert three == ["OPDLM", "OPDLM_off", "off-policy distillation", "SFT"]
    assert all(each == [0] for name, each in seeds.items() if name not in three)
    for arm in runs:
        base = next(r for r in runs if r.seed == arm.seed).config
        data = arm.config.data.model_copy(update={"responses": base.data.responses})
        assert data == base.data and arm.config.pipeline == base.pipeline
        assert arm.config.evaluation == base.evaluation and arm.config.evaluation.held_out_prompts == 256
        alike = {"freeze_embeddings": False, "compile": base.learner.compile}
        assert arm.config.learner.model_copy(update=alike) == base.learner


def test_every_arm_fits_one_gpu_with_all_its_pools(runs):
    for arm in runs:
        config = arm.config
        pools = [(t.actors, t.resources.gpus) for t in config.teacher.pools.values()]
        roles = [
            (config.rollout.actors, config.rollout.resources.gpus),
            (config.learner.ranks, config.learner.resources.gpus),
        ]
        assert 0.9 < sum(count * gpus for count, gpus in pools + roles) <= 1, arm.name
    (several,) = [arm.config for arm in runs if arm.name == "several teachers"]
    assert list(several.teacher_paths.values()) == [several.model.path] * 2
    assert [several.teacher_of(domain) for domain in ("", "math")] == [0, 1]


@pytest.mark.parametrize("name", ARMS)
def test_an_update_of_every_arm_is_finite(runs, models, name):
    """Rollouts or offline responses, as the arm has them, through state selection, packing, loss and gradient."""
    student, teacher, tokenizer = models
    config = next(arm.config for arm in runs if arm.name == name)
    config = config.model_copy(update={"block_size": 4})
    parts, end = config.objective.parts, tokenizer.eos_token_id
    noise = NoiseTokens(len(tokenizer), tokenizer.mask_token_id)
    rows = []
    for number, part in enumerate(parts):
        own = trajectories(student, tokenizer, DynamicUnmasking(threshold=0.05), count=4, seed=number)
        if part.source.kind == "offline":
            prompts = [Prompt(t.ordinal, "q", t.prompt_ids, responses=(t.response_ids,)) for t in own]
            own = [offline_trajectory(p, 0, 14, 4, tokenizer.mask_token_id, end) for p in prompts]
        for t in own:
            t.sample = number
            t.domain = "math" if t.ordinal % 2 else ""
            select_states(t, part, 4, end, state_rng(0, t.ordinal, number), noise)
        rows += own
    if config.target_kind == "hidden":
        set_targets(teacher, rows)
    elif config.target_kind == "topk":
        set_topk(teacher, rows)
    width = {"hidden": student.config.hidden_size, "topk": K, "none": 0}[config.target_kind]
    meta = TrajectoryMeta(4, tokenizer.mask_token_id, "test", config.target_kind, width)
    heads = (TeacherHead(teacher.lm_head.weight),) * len(config.teacher.pools)
    builder = BatchBuilder.of(config, meta, attention="sdpa", device=CPU, **of_heads(heads))
    builders = builder.with_extra(config.objective, extra_weights(config.objective, 0))
    module = TrainingModule(student, config)
    if config.objective.terms.aligns_layers:
        module.alignment = LayerAlignment(student, teacher, config.objective.terms)
    student.zero_grad()
    rows.sort(key=lambda t: (t.ordinal, t.sample))
    (share,) = update_shares(rows, len(parts), samples=1, rows=4)
    for own, each in zip(share, builders, strict=True):
        if each.objective.reads_difficulty:
            with torch.no_grad():
                log_p = label_logprobs(own, each, 0, 1, lambda batch: module(batch, None))
            own = kept(own, log_p.numpy(), each.objective, 4, config.seed)
        sums = empty_sums(CPU)
        for micro in each.update(own, 0, 1)[0]:
            module(each.tensors(micro, own), sums).backward()
        assert sums.loss.item() > 0 and not sums.bad.item()
    for part in (student.get_input_embeddings(), *student.model.layers):  # of freeze_embeddings and alignment
        part._forward_hooks.clear()
    moved = [name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) > 10
    assert all(np.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
