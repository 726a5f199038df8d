"""How near a response is to the student: the share of its tokens that are among the student's best where they stand
(BRTS, arXiv 2605.09725)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from actors.teacher.targets import TargetRequest, Targets, TopkTargets
from actors.teacher.transformers_backend import TransformersBackend
from common.config.run import RunConfig
from common.ray_actor import as_ray_actor

STUDENT_BEST = 16  # tokens of the student's distribution that count as its own


class OverlapActor:
    """A process with the model that becomes the student, read causally: constructed with it loaded, then `overlap` any
    number of times. It takes the resources of a rollout actor."""

    def __init__(self, config: RunConfig, tokens: int | None = None) -> None:
        rollout = config.rollout
        torch.set_num_threads(rollout.resources.threads)
        reader = {"target": "topk", "top_k": STUDENT_BEST, "dtype": rollout.dtype, "resources": rollout.resources}
        self.backend = TransformersBackend(config.teacher.model_copy(update=reader), config.model.path, tokens)

    def ready(self) -> dict[str, Any]:
        return {"role": "overlap", "pid": os.getpid(), "node": ray.util.get_node_ip_address()}

    def overlap(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """float64 [n]: for each prompt and response, int32 ids, the share of the response's tokens that are among the
        STUDENT_BEST most likely ones behind what stands before them."""
        requests = [
            TargetRequest(np.concatenate(pair), len(pair[0]) + np.arange(len(pair[1]), dtype=np.int32))
            for pair in pairs
        ]
        found = self.backend.targets(requests)
        return np.array([_share(response, best) for (_, response), best in zip(pairs, found, strict=True)])


def _share(response: np.ndarray, best: Targets) -> float:
    assert isinstance(best, TopkTargets)
    return float((best.ids == response[:, None]).any(axis=1).mean())


def as_remote(config: RunConfig) -> Any:
    return as_ray_actor(OverlapActor, config.rollout.resources)
