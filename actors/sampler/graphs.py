"""CUDA graphs of the sampler's passes.

Captured here and not by torch.compile ("reduce-overhead"), which captures no function that changes its inputs in place:
a pass changes the cache and the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class PassGraphs:
    """Runs a pass eagerly at its first use, which compiles its kernels; captures it at the second; then replays it.

    All tensors that a pass reads or changes must keep their addresses. All graphs share one memory pool: passes run one
    after the other, and the result of one is copied before the next runs.
    """

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, device_pass: Callable[[], Tensor]) -> Tensor:
        """The result of the pass with this key; all that its shapes and its code depend on must be in the key."""
        if key not in self._seen:
            self._seen.add(key)
            return device_pass()
        if key not in self._captured:
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may receive new weights during the capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = device_pass()
            self._captured[key] = graph, result
        graph, result = self._captured[key]
        graph.replay()
        return result
