"""The real loop on CPU: Ray, a real teacher engine, Arrow, ZeRO-3 ranks, weights back into the rollout actors."""

import json
from pathlib import Path

import pytest
import torch

from common.chat import asked_with
from common.config.file import load_config
from common.student import load_model
from common.trajectory import from_batch, read_spool
from deploy.pipeline import run
from deploy.run_folder import foreign_entries
from learner.phase_clock import PHASES
from tests.models import tiny_qwen3, tiny_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BATCHES = 6
SMALL = [
    "--pipeline.max_batches", str(BATCHES), "--pipeline.spool", "true", "--rollout.prompts_per_batch", "16",
    "--evaluation.count", "8", "--evaluation.every_batches", "4",
    "--evaluation.held_out_prompts", "5", "--evaluation.held_out_tokens", "40",
    "--learner.warmup_batches", "1", "--learner.batch_rows", "4",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["--teacher.backend", "vllm", "--teacher.target", "hidden"],
        pytest.param(
            ["--teacher.backend", "vllm", "--teacher.target", "topk", "--rollout.actors", "1", "--learner.ranks", "1"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            [
                "--teacher.backend", "transformers", "--teacher.target", "topk", "--objective.topk_tail", "renorm",
                "--rollout.actors", "3", "--teacher.actors", "2", "--learner.resources.cpus", "0.25",
                "--pipeline.staleness", "1", "--rollout.slots", "2", "--rollout.stream_rows", "1",  # dealt when free
            ],
            marks=pytest.mark.long,
        ),
    ],
    ids=["vllm-hidden", "vllm-topk-one-actor-one-rank", "transformers-topk-three-actors-two-teachers-stale"],
)  # fmt: skip
def test_loop_learns_and_every_actor_advances(tmp_path, overrides):
    config = load_config("tiny", ["--output_dir", str(tmp_path), *SMALL, *overrides])
    summary = run(config)
    folder = tmp_path / "tiny"

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["batch"] for m in metrics] == list(range(BATCHES))
    assert metrics[-1]["kl"] < 0.7 * metrics[0]["kl"]
    assert [m["weights_version"] for m in metrics] == list(range(1, BATCHES + 1))

    assert all(0 < m["rollout/slots_in_use"] <= 1 for m in metrics)  # of time, which a busy machine stretches

    assert [m["batch"] for m in metrics if m["eval/exact_match"] is not None] == [3, BATCHES - 1]
    # the last block is decoded to its end, but at most 72 tokens of a response count
    assert metrics[-1]["eval/tokens_per_step"] >= 72 / 75
    assert metrics[-1]["epoch"] == pytest.approx(16 * BATCHES / 4096, rel=0.5)

    staleness = config.pipeline.staleness
    ordinals: list[int] = []
    asked: set[tuple[int, ...]] = set()
    for index in range(BATCHES):
        batches = read_spool(folder / "spool" / f"batch-{index:06d}.arrow")
        rows = [t for batch in batches for t in from_batch(batch)[0]]
        # every actor gets a share, so one version in a batch means that every actor runs it
        assert {t.weights_version for t in rows} == {max(index - staleness, 0)}
        ordinals += [t.ordinal for t in rows]
        asked |= {tuple(t.prompt_ids) for t in rows}
        assert all(len(t.target_offsets) for t in rows)
    assert sorted(ordinals) == list(range(16 * BATCHES))
    assert metrics[-1]["staleness"] == staleness

    held_out = json.loads((folder / "held_out.json").read_text())["prompts"]
    assert len(held_out) == 5 and not asked & {tuple(row["prompt_ids"]) for row in held_out}
    responses = sum(len(row["response_ids"]) for row in held_out)
    before, after = summary["held_out_kl_init"], summary["held_out_kl"]
    assert before["tokens"] == after["tokens"] == responses and after["mean"] < 0.7 * before["mean"]
    assert [m["batch"] for m in metrics if m["eval/held_out_kl"] is not None] == [3, BATCHES - 1]
    assert [metrics[-1][f"eval/held_out_kl_{o}"] for o in range(1, 5)] == pytest.approx(after["by_offset"])

    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["teacher"]["exact_match"] > 0.9
    assert summary["student_init"]["exact_match"] == 0
    assert {"static", "dynamic"} == set(summary["student"])
    assert summary["train"]["updates"] == 4 * BATCHES
    assert (folder / "config.yaml").exists()
    assert list((folder / "tensorboard").iterdir())
    saved = load_model(str(folder / "checkpoints" / "final"), torch.float32, "sdpa")
    started = load_model(config.model.path, torch.float32, "sdpa")
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), started.parameters(), strict=True))
    assert Path(folder / "checkpoints" / "final" / "tokenizer.json").exists()
    assert saved.config.opdlm == asked_with(config.data)  # how the student is to be asked
    assert foreign_entries(folder) == []  # so that --overwrite knows all that a run writes


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "mask_token", "target"),
    [
        pytest.param(288, 320, "auto", "hidden", marks=pytest.mark.long, id="larger-teacher"),
        pytest.param(320, 288, "auto", "topk", marks=pytest.mark.long, id="smaller-teacher"),
        pytest.param(262, 288, "new", "hidden", id="added-row-and-a-teacher"),
        pytest.param(262, None, "new", "topk", marks=pytest.mark.long, id="added-row"),
    ],
)
def test_student_and_teacher_with_different_rows_train_together(
    tmp_path, student_rows, teacher_rows, mask_token, target
):
    """Random models, whose padding rows carry much of the probability: none of it may reach a trajectory or a loss."""
    tokenizer = tiny_tokenizer() if mask_token == "new" else None
    student = tiny_qwen3(tmp_path / "student", tokenizer=tokenizer, vocab=student_rows)
    teacher = tiny_qwen3(tmp_path / "teacher", 1, tokenizer=tokenizer, vocab=teacher_rows) if teacher_rows else student
    config = load_config("tiny", [
        "--output_dir", str(tmp_path), "--model.path", student, "--teacher.path", teacher, "--pipeline.spool", "true",
        "--model.mask_token", mask_token, "--teacher.backend", "transformers", "--teacher.target", target,
        "--pipeline.max_batches", "2", "--rollout.prompts_per_batch", "8", "--rollout.actors", "1",
        "--evaluation.problems", "null", "--curriculum.min_tokens", "16", "--curriculum.max_tokens", "16",
    ])  # fmt: skip
    run(config)
    folder = tmp_path / "tiny"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["weights_version"] for m in metrics] == [1, 2]
    assert all(0 < m["kl"] < 20 for m in metrics)
    for m in metrics:
        assert sum(m[f"learner/{phase}_s"] for phase in PHASES) == pytest.approx(m["seconds/learner"], rel=0.05)
        assert min(m["learner/forward_s"], m["learner/backward_s"], m["learner/optimizer_s"]) > 0
    tokens = 263 if mask_token == "auto" else 262  # with and without its mask token
    for index in range(2):
        for batch in read_spool(folder / "spool" / f"batch-{index:06d}.arrow"):
            for t in from_batch(batch)[0]:
                assert t.response_ids.max() < tokens
                assert target == "hidden" or t.topk_ids.max() < tokens
    saved = load_model(str(folder / "checkpoints" / "final"), torch.float32, "sdpa")
    assert saved.get_output_embeddings().weight.shape[0] == (320 if mask_token == "new" else student_rows)
