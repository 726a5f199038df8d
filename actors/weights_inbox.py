"""The inbox of weights: a version is fetched while the sampler runs, and copied into the model between two rollouts.

Left out: a second model that the sampler would switch to. The pause would be shorter, but CUDA graphs hold the
addresses of the first model's parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from queue import Empty, Queue

import torch
from torch import Tensor, nn

from common.weights.transport import WeightsHandle, WeightsTransport, load_weights


class WeightsInbox:
    """Holds at most one version: the next one may be fetched when the one before was swapped in.

    Life cycle of a version: `fetch` in a thread of its own, then `swap` in the sampler's thread. Either may be called
    first; `swap` waits for the fetch.

        fetching thread             the sampler's thread
        inbox.fetch(handle_of_1)    ... samples with version 0
                                    inbox.swap(model, 1)
        inbox.fetch(handle_of_2)    ... samples with version 1
                                    inbox.swap(model, 2)

    `pause_seconds` is the total time that `swap` took, including its wait for the fetch.
    """

    def __init__(
        self,
        transport: WeightsTransport,
        timeout_s: float,
        load: Callable[[nn.Module, Iterable[tuple[str, Tensor]]], None] = load_weights,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`load` copies what was fetched into a model's own memory."""
        self.transport = transport
        self.timeout_s = timeout_s
        self._load = load
        self._stopwatch = stopwatch
        self.pause_seconds = 0.0
        self._fetched: Queue[tuple[int, list[tuple[str, Tensor]] | Exception]] = Queue(maxsize=1)

    def fetch(self, handle: WeightsHandle, transport: WeightsTransport | None = None) -> None:
        """Receive and verify a version, by `transport` if given. An error is raised here and again by `swap`."""
        try:
            tensors = (transport or self.transport).fetch(handle)
        except Exception as error:
            self._fetched.put((handle.version, error), timeout=self.timeout_s)
            raise
        self._fetched.put((handle.version, tensors), timeout=self.timeout_s)

    def swap(self, model: nn.Module, version: int) -> None:
        """Copy the fetched version into the model's parameters, in place.

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
        self._load(model, tensors)
        if any(parameter.is_cuda for parameter in model.parameters()):
            torch.cuda.current_stream().synchronize()  # the next fetch overwrites these tensors
        self.pause_seconds += self._stopwatch() - start
