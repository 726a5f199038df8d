"""`teacher.backend: self`: the clean tokens of the learner's forward are the original's pass, and give its targets."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from actors.teacher.actor import annotate, build_backend
from common.config.file import load_config
from common.config.run import RunConfig
from common.config.teacher import TeacherConfig
from common.conversion import convert, load_converted, own_head, save_student, student_of
from common.lora import adapter_parameters
from common.prompts import Prompt
from common.responses import offline_trajectory
from common.seeds import state_rng
from common.states import select_states
from common.student import attention_windows, hidden_states, lm_head_weight, load_model
from common.trajectory import Trajectory, TrajectoryMeta, to_batch
from common.vocabulary import tokenizer_fingerprint
from deploy.checkpoints import RunState
from deploy.commands.dry_run import show
from deploy.placement import plan
from deploy.run_cost import RunCost
from learner.batches import BatchBuilder
from learner.faults import write_fault
from learner.objective import CleanStream, HiddenTarget, empty_sums
from learner.packing import document
from learner.replay import replay
from learner.training_module import TrainingModule
from tests.adapters import with_adapters
from tests.models import tiny_family, tiny_qwen3, tiny_tokenizer

BLOCK = 4
CPU = torch.device("cpu")
OWN: dict[str, Any] = {
    "adapter": {"rank": 3, "alpha": 6, "gate": "mask"},
    "attention": {"context": "causal"},
    "teacher": {"backend": "self"},
}


def run_config(path: str = "m", objective: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    common = {
        "model": {"path": path},
        "data": {"prompts": "p", "responses": "r"},
        "objective": {"method": "drafter", **(objective or {})},
        "learner": {"dtype": "float32", "max_tokens_per_microbatch": 128},
    }
    return RunConfig.model_validate(common | OWN | sections)


def rows_for(config: RunConfig, conversion: Any, count: int = 7) -> list[Trajectory]:
    rng = np.random.default_rng(2)
    rows = []
    for number in range(count):
        ids, response = (rng.integers(5, 200, n).astype(np.int32) for n in rng.integers(1, 18, 2))
        prompt = Prompt(number, "q", ids, responses=(response,))
        t = offline_trajectory(prompt, 0, 17, BLOCK, conversion.config.mask_token_id, conversion.end_tokens)
        select_states(t, config.objective, BLOCK, conversion.end_tokens, state_rng(0, number, 0))
        rows.append(t)
    return rows


def trained(config: RunConfig, conversion: Any, kind: str, rows: list[Trajectory], **fields: Any):
    """Loss, divergence of each position, gradients by name, and the targets of the first micro-batch."""
    student = with_adapters(load_converted(config.model.path, conversion, torch.float32, "sdpa"))
    module = TrainingModule(student, config)
    meta = TrajectoryMeta(BLOCK, conversion.config.mask_token_id, "", kind, student.config.hidden_size)
    windows = attention_windows(conversion.config)
    build = BatchBuilder.of(config, meta, attention="sdpa", device=CPU, windows=windows, **fields)
    sums = empty_sums(CPU)
    sums.per_position = []
    batches, _ = build.update(rows, 0, 1)
    tensors = [build.tensors(batch, rows) for batch in batches]
    for batch in tensors:
        module(batch, sums).backward()
    gradients = {name: p.grad for name, p in adapter_parameters(student).items()}
    assert all(p.grad is None for name, p in student.named_parameters() if name not in gradients)
    return sums.loss.item(), torch.cat(sums.per_position), gradients, tensors, student


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "qwen2-sliding"])
@pytest.mark.parametrize(
    "objective",
    [{}, {"target": {"kind": "teacher", "temperature": 0.7, "top_k": 5}, "terms": {"alignment": 0.5}}],
    ids=["plain", "reshaped"],
)
def test_targets_losses_and_gradients_are_those_of_the_transformers_teacher(tmp_path, family, objective):
    path = tiny_family(tmp_path / "model", family)
    own = run_config(path, objective)
    conversion = student_of(own)
    rows = rows_for(own, conversion)
    loss, divergences, gradients, tensors, student = trained(own, conversion, "none", rows, **own_head(own, conversion))

    backend = build_backend(TeacherConfig(backend="transformers", dtype="float32", max_batched_tokens=64), path)
    annotate(backend, rows)
    shipped = run_config(path, objective, teacher={"backend": "transformers", "dtype": "float32"})
    head = load_model(path, torch.float32, "sdpa").lm_head.weight.detach()
    expected = trained(shipped, conversion, "hidden", rows, teacher_head=head)
    assert len(divergences) == len(expected[1]) > 40
    assert loss == pytest.approx(expected[0], rel=1e-5)
    # documents are longer with their targets, so that micro-batches may be others
    order, other = (np.lexsort(keys_of(batches)) for batches in (tensors, expected[3]))
    torch.testing.assert_close(divergences[order], expected[1][other], atol=1e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[2][name], atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert max(g.abs().max() for g in gradients.values()) > 1e-3
    read = targets_of(student, tensors)
    given = torch.cat([batch.target.hidden for batch in expected[3]])
    torch.testing.assert_close(torch.cat([t.hidden for t in read])[order], given[other], atol=1e-5, rtol=1e-4)


def keys_of(batches: list) -> np.ndarray:
    """Document, copy and position of each trained position."""
    rows = [batch.layout.flatten(1)[[2, 3, 1]][:, batch.loss_index] for batch in batches]
    return torch.cat(rows, dim=1).numpy()


def targets_of(student: Any, tensors: list) -> list[HiddenTarget]:
    read = []
    for batch in tensors:
        assert isinstance(batch.target, CleanStream)
        masked = (batch.ids == student.config.mask_token_id) & (batch.copy > 0)
        hidden = hidden_states(student, batch.ids, batch.positions, batch.mask, masked)
        assert hidden.requires_grad
        read.append(batch.target.of(hidden, lm_head_weight(student)))
        assert not read[-1].hidden.requires_grad
    return read


def test_targets_are_the_originals_bit_by_bit_at_equal_shapes(tmp_path):
    path = tiny_qwen3(tmp_path)
    config = run_config(path)
    conversion = student_of(config)
    *_, tensors, student = trained(config, conversion, "none", rows_for(config, conversion))
    original = load_model(path, torch.float32, "sdpa")
    for batch, read in zip(tensors, targets_of(student, tensors), strict=True):
        with torch.no_grad():
            plain = hidden_states(original, batch.ids, batch.positions, batch.mask)
        assert torch.equal(read.hidden, plain.reshape(-1, plain.shape[-1])[batch.target.index])
        assert torch.equal(read.head, original.lm_head.weight)
    assert len(read.hidden)


def test_the_row_of_a_new_mask_token_has_no_probability(tmp_path):
    """As with a teacher that has fewer rows than its student."""
    path = tiny_qwen3(tmp_path, tokenizer=tiny_tokenizer(), vocab=262)
    config = run_config(path, model={"path": path, "mask_token": "new"})
    conversion = student_of(config)
    assert conversion.config.vocab_size > 262
    fields = own_head(config, conversion)
    *_, tensors, student = trained(config, conversion, "none", rows_for(config, conversion), **fields)
    (log_p, *_) = [target.logprobs() for target in targets_of(student, tensors)]
    assert log_p[:, :262].exp().sum(-1) == pytest.approx(np.ones(len(log_p)), abs=1e-5)
    assert bool((log_p[:, 262:] == -torch.inf).all())


def test_an_update_that_was_left_out_is_replayed_with_its_own_targets(tmp_path):
    path = tiny_qwen3(tmp_path / "model")
    config = run_config(path)
    conversion = student_of(config)
    rows = rows_for(config, conversion)
    loss, *_, student = trained(config, conversion, "none", rows)
    mask, vocabulary = conversion.config.mask_token_id, tokenizer_fingerprint(conversion.tokenizer)
    facts = {"update": 3, "ranks": 2, "wrong": "", "extra_weights": (), "config": config.model_dump(mode="json")}
    fault = write_fault(tmp_path / "faults", [to_batch(rows, TrajectoryMeta(BLOCK, mask, vocabulary))], facts)
    adapter = {name: p.detach() for name, p in adapter_parameters(student).items()}
    save_student(student, conversion, fault / "model", BLOCK, adapter, config.adapter, path)
    again = replay(fault)
    assert again.whole.loss == pytest.approx(loss, rel=1e-5)
    assert again.whole.finite and again.whole.grad_norm > 0


def test_noised_tokens_read_what_they_read_without_targets(tmp_path):
    """The clean tokens of the last block are seen by none of them."""
    config = run_config(tiny_qwen3(tmp_path))
    conversion = convert(str(tmp_path), BLOCK, context="causal")
    longer = 0
    for t in rows_for(config, conversion):
        plain, own = (document(t, BLOCK, 262, "causal", with_targets) for with_targets in (False, True))
        more = len(own) - len(plain)
        longer += more
        assert 0 <= more < BLOCK
        assert not len(plain.before_index)
        assert own.ids[own.before_index].tolist() == t.x0[own.positions[own.loss_index] - 1].tolist()
        assert (own.copy[own.before_index] == 0).all()
        noised, start = own.copy > 0, own.block[own.copy > 0]
        assert (own.positions[own.copy == 0][len(plain) - noised.sum() :] >= start.max()).all()
        assert own.ids[noised].tolist() == plain.ids[plain.copy > 0].tolist()
    assert longer


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {}}, "adapter.rank is 0; set it to e.g. 32, and adapter.gate to 'mask'"),
        ({"adapter": {"rank": 4}}, "adapter.gate is 'none'; set it to 'mask'"),
        ({"attention": {"context": "block"}}, "attention.context is 'block'; set it to 'causal'"),
        ({"teacher": {"backend": "self", "path": "other"}}, "teacher.path is 'other'; leave it out"),
        ({"teacher": {"backend": "self", "target": "topk"}}, "teacher.target is 'topk'; set it to 'hidden'"),
        (
            {"teacher": [{"backend": "self"}, {"domains": ["math"], "backend": "vllm"}]},
            "teacher.others is 1; give one teacher",
        ),
        (
            {"teacher": [{"backend": "vllm"}, {"domains": ["math"], "backend": "self"}]},
            "teacher.others.0.backend 'self' takes targets",
        ),
        (
            {"objective": {"terms": {"alignment": 1.0, "alignment_of": "layers"}}, "learner": {"compile": False}},
            "objective.terms.alignment_of is 'layers'; set it to 'final'",
        ),
        (
            {"objective": {"target": {"kind": "teacher", "block_aware": 0.5}}},
            "objective.target.block_aware is 0.5; set it to 0",
        ),
    ],
)
def test_what_the_original_cannot_be_is_refused(sections, words):
    with pytest.raises(ValidationError) as error:
        run_config(**sections)
    assert words in str(error.value)
    assert "backend to 'transformers'" in str(error.value)


def test_hard_labels_need_no_original():
    objective = {"method": "sft"}
    config = run_config(objective=objective, adapter={})
    assert (config.teaches_itself, config.target_kind) == (False, "none")


def test_no_teacher_is_placed_paid_or_shipped_for():
    responses = ["--data.responses", "r.parquet"]
    config = load_config("drafter-smollm2", responses)
    shipped = load_config("drafter-smollm2", [*responses, "--teacher.backend", "transformers"])
    placement, other = plan(config), plan(shipped)
    assert {p.role for p in placement.processes} == {"rollout", "learner"}
    assert {p.role for p in other.processes} == {"rollout", "learner", "teacher"}
    assert placement.gpus == pytest.approx(1)
    learner, of_other = (next(p.memory for p in x.processes if p.role == "learner") for x in (placement, other))
    assert learner["teacher's LM head"] == 0 < of_other["teacher's LM head"]
    state = RunState(response_tokens=10)
    costs, of_other = (RunCost.of(c, p).metrics(state) for c, p in ((config, placement), (shipped, other)))
    assert costs["flops/teacher"] == 0 < of_other["flops/teacher"]
    assert costs["flops/learner"] == of_other["flops/learner"]
    console = Console(record=True, width=160, file=io.StringIO())
    show(config, console)
    assert "not used: the learner's own forward gives them" in console.export_text()
