"""The inbox of weights: one version is fetched beside the sampler, and swapped in between two rollouts."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, Queue

import torch
from torch import Tensor, nn

from common.weights.transport import WeightsHandle, WeightsTransport, load_weights


class WeightsInbox:
    """Life cycle of a version: `fetch` in a thread of its own, then `swap` in the sampler's, which frees the inbox.

    It holds one version at most: the next may be fetched after the last was swapped in. `pause_seconds` counts how long
    `swap` kept the sampler's thread in all, waiting for the fetch included.
    """

    def __init__(
        self, transport: WeightsTransport, timeout_s: float, stopwatch: Callable[[], float] = time.perf_counter
    ) -> None:
        self.transport = transport
        self.timeout_s = timeout_s
        self._stopwatch = stopwatch
        self.pause_seconds = 0.0
        self._fetched: Queue[tuple[int, list[tuple[str, Tensor]] | Exception]] = Queue(maxsize=1)

    def fetch(self, handle: WeightsHandle) -> None:
        """Receive and verify a version. What it raises, `swap` raises too."""
        try:
            tensors = self.transport.fetch(handle)
        except Exception as error:
            self._fetched.put((handle.version, error), timeout=self.timeout_s)
            raise
        self._fetched.put((handle.version, tensors), timeout=self.timeout_s)

    def swap(self, model: nn.Module, version: int) -> None:
        """Copy the fetched version into the model's parameters, where they are.

        Raises:
            TimeoutError: it was not fetched in time.
            ValueError: another version was fetched, or it does not fit the model.
        """
        start = self._stopwatch()
        try:
            fetched, tensors = self._fetched.get(timeout=self.timeout_s)
        except Empty:
            raise TimeoutError(f"weights version {version} was not fetched within {self.timeout_s:.0f} s") from None
        if isinstance(tensors, Exception):
            raise tensors
        if fetched != version:
            raise ValueError(f"weights version {fetched} was fetched, expected {version}")
        load_weights(model, tensors)
        if any(parameter.is_cuda for parameter in model.parameters()):
            torch.cuda.current_stream().synchronize()  # the next fetch writes where these tensors are
        self.pause_seconds += self._stopwatch() - start
