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

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BATCHES = 6
SMALL = [
    "--pipeline.max_batches", str(BATCHES), "--pipeline.spool", "true", "--rollout.prompts_per_batch", "16",
    "--evaluation.count", "8", "--evaluation.every_batches", "4",
    "--learner.warmup_batches", "1", "--learner.batch_rows", "4",
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["--teacher.backend", "vllm", "--teacher.target", "hidden"],
        ["--teacher.backend", "vllm", "--teacher.target", "topk", "--rollout.actors", "1", "--learner.ranks", "1"],
        [
            "--teacher.backend", "transformers", "--teacher.target", "topk", "--objective.topk_tail", "renorm",
            "--rollout.actors", "3", "--teacher.actors", "2", "--learner.resources.cpus", "0.25",
            "--pipeline.staleness", "1",
        ],
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

    assert [m["batch"] for m in metrics if m["eval/exact_match"] is not None] == [3, BATCHES - 1]
    # the last block is decoded to its end, but at most 72 tokens of a response count
    assert metrics[-1]["eval/tokens_per_step"] >= 72 / 75
    assert metrics[-1]["epoch"] == pytest.approx(16 * BATCHES / 4096, rel=0.5)

    staleness = config.pipeline.staleness
    ordinals: list[int] = []
    for index in range(BATCHES):
        batches = read_spool(folder / "spool" / f"batch-{index:06d}.arrow")
        rows = [t for batch in batches for t in from_batch(batch)[0]]
        # prompts are dealt to all actors in turn, so one version in a batch means that every actor runs it
        assert {t.weights_version for t in rows} == {max(index - staleness, 0)}
        ordinals += [t.ordinal for t in rows]
        assert all(len(t.target_offsets) for t in rows)
    assert sorted(ordinals) == list(range(16 * BATCHES))
    assert metrics[-1]["staleness"] == staleness

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
