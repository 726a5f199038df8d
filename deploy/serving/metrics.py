"""Prometheus metrics of a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.trajectory import Trajectory

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServingMetrics:
    """One registry a server; names begin with `opdlm_serve_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"opdlm_serve_{name}", meaning, labels, registry=self.registry)

        def histogram(name: str, meaning: str) -> Histogram:
            return Histogram(f"opdlm_serve_{name}", meaning, registry=self.registry, buckets=_SECONDS)

        self.requests = counter("requests", "HTTP requests answered", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "tokens of the prompts of finished sequences")
        self.known_tokens = counter(
            "prefix_tokens",
            "tokens of prompts that were cached already, with an earlier sequence of the same beginning",
        )
        self.tokens = counter("tokens", "tokens of finished responses")
        self.steps = counter("steps", "denoising steps of finished sequences")
        self.sequences = counter("sequences", "finished sequences", "finish_reason")
        self.cancelled = counter("cancelled", "sequences whose client went away or whose time was over")
        self.passes = counter("passes", "forwards over all running sequences")
        self.first_block = histogram("first_block_seconds", "from a sequence's arrival to its first finished block")
        self.seconds = histogram("sequence_seconds", "from a sequence's arrival to its end")
        self._gauges = [
            Gauge(f"opdlm_serve_{name}", meaning, registry=self.registry)
            for name, meaning in (
                ("running", "sequences in slots"),
                ("waiting", "sequences in the queue"),
                ("slots", "sequences that can be decoded together"),
                ("weights_version", "how many times the weights were read again"),
            )
        ]

    def watch(self, *values: Callable[[], int]) -> None:
        """What the gauges show, in their order: running, waiting, slots, weights_version."""
        for gauge, value in zip(self._gauges, values, strict=True):
            gauge.set_function(value)

    def ended(self, trajectory: Trajectory, seconds: float) -> None:
        self.prompt_tokens.inc(len(trajectory.prompt_ids))
        self.tokens.inc(len(trajectory.response_ids))
        self.steps.inc(trajectory.denoise_forwards)
        self.sequences.labels(trajectory.finish_reason).inc()
        self.seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
