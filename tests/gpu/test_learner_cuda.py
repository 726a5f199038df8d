"""Updates with whole weights in CUDA graphs beside the same with DeepSpeed's hooks and plain layers."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from common.config.run import RunConfig
from common.trajectory import TrajectoryMeta
from tests.benchmarks.learner_step import random_trajectories
from tests.models import tiny_qwen3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BLOCK = 4
# responses of an update's trajectories: widths that are captured, one that comes again, and one that comes first behind
# another micro-batch
LENGTHS = ((60,), (130,), (260,), (130,), (500, 90))


def losses(
    path: str, max_tokens: int, dtype: str, learner: dict[str, Any], sections: dict[str, Any]
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of one update for each of LENGTHS."""
    from learner.rank import LearnerRank

    options = {"gradient_checkpointing": False, "max_tokens_per_microbatch": max_tokens, "dtype": dtype, "lr": 1e-3}
    config = RunConfig.model_validate(
        {
            "block_size": BLOCK,
            "model": {"path": path},
            "data": {"prompts": path},
            "learner": options | learner | {"resources": {"gpus": 1}},
            **sections,
        }
    )
    rank = LearnerRank(config, 0)
    rank.start("127.0.0.1", rank.address()[1])
    width = rank.conversion.config.hidden_size
    meta = TrajectoryMeta(BLOCK, rank.conversion.config.mask_token_id, "test", config.target_kind, width)
    builders = rank._builders(meta, ())
    found = []
    for responses in LENGTHS:
        rows = [t for response in responses for t in random_trajectories(width, 3, 20, response, False)]
        rows = [replace(t, ordinal=i) for i, t in enumerate(rows)]
        update = rank.updater.prepared([rows], builders)
        totals, wrong = rank.updater.step(*rank.updater.accumulated(update, builders, False))
        assert not wrong, wrong
        found.append((totals["loss"], totals["grad_norm"]))
    return found


GATED = {"adapter": {"rank": 4, "gate": "mask"}}
OWN_TEACHER = {**GATED, "attention": {"context": "causal"}, "teacher": {"backend": "self"}}


@pytest.mark.parametrize("sections", [{}, GATED, OWN_TEACHER], ids=["all weights", "gated adapter", "own teacher"])
@pytest.mark.parametrize("max_tokens", [4096, 256], ids=["one micro-batch", "several"])
def test_graphed_updates_are_those_of_deepspeeds_hooks(tmp_path, max_tokens, sections):
    path = tiny_qwen3(tmp_path / "model", seed=1)
    hooks = {"deepspeed": {"zero_optimization": {"stage3_model_persistence_threshold": 0}}}
    graphed = in_a_process(path, max_tokens, {"compile": True}, sections)
    plain = in_a_process(path, max_tokens, hooks, sections)
    for ours, theirs in zip(graphed, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def in_a_process(
    path: str, max_tokens: int, learner: dict[str, Any], sections: dict[str, Any]
) -> list[tuple[float, float]]:
    """DeepSpeed's process group stays in a process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(losses, path, max_tokens, "float32", learner, sections).result()
