"""The real loop by both weights transports: every actor advances, and the weights are the same, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from common.config.file import load_config
from common.trajectory import from_batch, read_spool
from deploy.pipeline import run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
BATCHES = 3


def trained(folder, *overrides: str):
    """Rows by batch, metrics and final weights of a short run on two rollout actors and two ranks.

    The teacher reads every sequence alone: what arrives together depends on timing, and changes its last bits.
    """
    config = load_config(
        "tiny",
        [
            "--output_dir", str(folder), "--pipeline.max_batches", str(BATCHES), "--pipeline.spool", "true",
            "--rollout.prompts_per_batch", "16", "--learner.batch_rows", "4", "--learner.warmup_batches", "1",
            "--teacher.backend", "transformers", "--teacher.max_batched_tokens", "16",
            "--evaluation.problems", "null", *overrides,
        ],
    )  # fmt: skip
    run(config)
    spools = [folder / "tiny" / "spool" / f"batch-{i:06d}.arrow" for i in range(BATCHES)]
    rows = [sorted((t for b in read_spool(s) for t in from_batch(b)[0]), key=lambda t: t.ordinal) for s in spools]
    metrics = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return rows, metrics, load_file(folder / "tiny" / "checkpoints" / "final" / "model.safetensors")


@pytest.mark.long
def test_broadcast_gives_what_the_object_store_gives(tmp_path):
    rows, metrics, weights = trained(tmp_path / "broadcast", "--publish.transport", "broadcast")
    expected_rows, _, expected_weights = trained(tmp_path / "store", "--publish.transport", "object_store")
    # prompts are dealt to all actors in turn, so one version in a batch means that every actor runs it
    assert [{t.weights_version for t in batch} for batch in rows] == [{i} for i in range(BATCHES)]
    assert [[t.response_ids.tolist() for t in batch] for batch in rows] == [
        [t.response_ids.tolist() for t in batch] for batch in expected_rows
    ]
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected_weights[name]), name
    assert metrics[0]["seconds/weights_pause"] == 0
    assert all(
        0 < m["seconds/weights_pause"] <= p["seconds/publish"] for m, p in zip(metrics[1:], metrics, strict=False)
    )


@pytest.mark.long
def test_broadcast_beside_rollouts(tmp_path):
    rows, _, _ = trained(tmp_path, "--publish.transport", "broadcast", "--pipeline.staleness", "1")
    assert [{t.weights_version for t in batch} for batch in rows] == [{0}, {0}, {1}]
