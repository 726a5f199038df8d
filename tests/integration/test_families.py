"""The whole loop on tiny random models of other families: ZeRO-3 ranks, sampler and teacher agree on attention."""

import json

import pytest

from common.config.file import load_config
from common.student import load_tokenizer
from deploy.pipeline import run
from tests.models import tiny_family

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SMALL = [
    "--teacher.backend", "transformers", "--rollout.prompts_per_batch", "16", "--pipeline.max_batches", "3",
    "--evaluation.problems", "null", "--learner.warmup_batches", "0", "--curriculum.schedule", "constant",
    "--curriculum.max_tokens", "24", "--rollout.actors", "1", "--learner.lr", "3e-3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        pytest.param("qwen2-sliding", 1, marks=pytest.mark.long),
        pytest.param("llama", 1, marks=pytest.mark.long),  # as the real model of another test
        pytest.param("gemma3", 2, marks=pytest.mark.long),
        pytest.param("qwen3-moe", 2, marks=pytest.mark.long),
    ],
)
def test_the_loop_learns(tmp_path, family, ranks):
    path = tiny_family(tmp_path / "arlm", family)
    own = ["--output_dir", str(tmp_path), "--model.path", path, "--learner.ranks", str(ranks)]
    run(load_config("tiny", [*own, *SMALL]))
    folder = tmp_path / "tiny"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["kl"] < 0.95 * metrics[0]["kl"]
    saved = json.loads((folder / "checkpoints" / "final" / "config.json").read_text())
    assert (saved["block_size"], saved["mask_token_id"]) == (4, load_tokenizer(path).mask_token_id)
