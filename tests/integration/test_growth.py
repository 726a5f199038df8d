"""Blocks that grow during training, with every extra term on: sampler, states, masks, teacher, checkpoint and resume
follow."""

import json
import shutil

import numpy as np
import pytest
import torch

from actors.teacher.actor import build_backend
from common.config.file import load_config
from common.student import load_model
from common.trajectory import from_batch, read_spool
from deploy.checkpoints import Checkpoints
from deploy.curriculum import Feedback
from deploy.pipeline import run

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

GROWN = [
    "--block_growth.kind", "steps", "--block_growth.sizes", "[8, 16]", "--block_growth.at_batches", "[1, 2]",
    "--block_growth.anchor", "true",
    "--curriculum.schedule", "entropy_gated", "--curriculum.gate_nats", "100", "--curriculum.step_tokens", "16",
    "--curriculum.gate_on", "training", "--curriculum.gate_opens", "below",
    "--curriculum.min_tokens", "16", "--curriculum.max_tokens", "64", "--data.limit", "40", "--data.epochs", "1",
    "--rollout.threshold_ramp.end", "0.8", "--rollout.threshold_ramp.ramp_batches", "2",
    "--objective.clip_nats", "5", "--objective.importance_weight", "true", "--objective.terms.sharpening", "0.01",
    "--objective.terms.rank", "0.01", "--objective.terms.alignment", "0.1", "--objective.terms.autoregressive", "0.1",
    "--teacher.backend", "transformers", "--learner.ranks", "1", "--rollout.prompts_per_batch", "16",
    "--pipeline.spool", "true", "--pipeline.checkpoint_every_batches", "2", "--evaluation.count", "4",
    "--learner.warmup_batches", "1",
]  # fmt: skip


def test_blocks_grow_and_a_resumed_run_goes_on_with_them(tmp_path):
    def config(batches: int):
        batches_of = ["--pipeline.max_batches", str(batches), "--output_dir", str(tmp_path)]
        return load_config("tiny", [*GROWN, *batches_of])

    run(config(3))
    folder = tmp_path / "tiny"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["block_size"] for m in metrics] == [4, 8, 16]
    assert [m["response_limit"] for m in metrics] == [16, 32, 48]
    assert [m["confidence_threshold"] for m in metrics] == [0.9, 0.85, 0.8]
    # the last batch is short: two updates instead of four; the decay goes over the last 2.5 of all ten
    assert [m["updates"] for m in metrics] == [4, 8, 10]
    assert [m["lr"] for m in metrics] == pytest.approx([6e-4, 6e-4, 6e-5 + 5.4e-4 / 2.5])
    for index, size in enumerate([4, 8, 16]):
        for batch in read_spool(folder / "spool" / f"batch-{index:06d}.arrow"):
            rows, meta = from_batch(batch)
            assert meta.block_size == size
            assert all(len(t.x0) % size == 0 for t in rows)
            assert max(t.reveal_round.max() for t in rows) < size
    for index, before in ((1, 4), (2, 8)):  # the student of the smaller blocks teaches the larger ones
        anchor = folder / "anchors" / f"block-{before}"
        assert json.loads((anchor / "config.json").read_text())["block_size"] == before
        backend = build_backend(config(3).anchored(anchor).teacher, str(anchor))
        rows = [t for b in read_spool(folder / "spool" / f"batch-{index:06d}.arrow") for t in from_batch(b)[0]]
        for t in rows[:4]:
            (targets,) = backend.targets([backend.request(t)])
            np.testing.assert_allclose(t.hidden, targets.hidden.ravel(), rtol=1e-3, atol=1e-3)
    final = load_model(str(folder / "checkpoints" / "final"), torch.float32, "sdpa")
    assert final.config.block_size == 16

    shutil.rmtree(folder / "checkpoints" / "final")  # as if the run had ended before its last batch was saved
    kept = Checkpoints(config(3)).latest()
    assert kept is not None
    assert (kept[1].block_size, kept[1].feedback) == (8, Feedback(gates=2))
    assert json.loads((kept[0] / "config.json").read_text())["block_size"] == 8

    (folder / "summary.json").unlink()
    run(config(3), resume=True)
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["block_size"] for m in again] == [4, 8, 16]
    for name in ("loss", "kl", "lr", "response_limit", "response_tokens", "confidence_threshold"):
        assert again[-1][name] == pytest.approx(metrics[-1][name], rel=1e-5), name
