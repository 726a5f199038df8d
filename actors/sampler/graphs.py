"""CUDA graphs of the sampler's passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class PassGraphs:
    """Runs a pass eagerly at its first use, which also warms up its kernels; captures it at the second; then replays.

    A pass reads and changes tensors that stay where they are. All graphs share one memory pool: only one runs at a
    time, and its result is read before the next.
    """

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, device_pass: Callable[[], Tensor]) -> Tensor:
        """The result of the pass with this key; everything that changes its shapes must be in the key."""
        if key not in self._seen:
            self._seen.add(key)
            return device_pass()
        if key not in self._captured:
            graph = torch.cuda.CUDAGraph()
            # thread_local: new weights may arrive in another thread meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = device_pass()
            self._captured[key] = graph, result
        graph, result = self._captured[key]
        graph.replay()
        return result
