"""The run's metrics: one registry of names, and one log that writes them as JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class MetricSpec:
    unit: str
    meaning: str


METRICS: dict[str, MetricSpec] = {
    "batch": MetricSpec("", "rollout batch, from 0"),
    "time": MetricSpec("s", "Unix time at which the batch was logged"),
    "loss": MetricSpec("nats", "normalised objective, mean over the batch's updates"),
    "kl": MetricSpec("nats/token", "divergence from the teacher, mean over trained positions"),
    "teacher_agreement": MetricSpec("share", "trained positions where both have the same most likely token"),
    "grad_norm": MetricSpec("", "global gradient norm before clipping, mean over updates"),
    "lr": MetricSpec("", "learning rate of the last update"),
    "tokens_per_step": MetricSpec("tokens", "response tokens per denoising forward of a sequence, in rollouts"),
    "stored_share": MetricSpec("share", "trajectories that are stored responses, not rollouts"),
    "share_eos": MetricSpec("share", "trajectories that end with the end token"),
    "response_length": MetricSpec("tokens", "mean response length"),
    "response_limit": MetricSpec("tokens", "response length limit of the curriculum"),
    "block_size": MetricSpec("tokens", "tokens per block in the rollouts"),
    "confidence_threshold": MetricSpec("", "threshold of dynamic unmasking in the rollouts; 0: another rule"),
    "response_tokens": MetricSpec("tokens", "response tokens so far, of rollouts and stored responses"),
    "trained_positions": MetricSpec("tokens", "masked positions in the loss of this batch"),
    "updates": MetricSpec("", "optimiser updates so far"),
    "weights_version": MetricSpec("", "version published after this batch"),
    "staleness": MetricSpec("versions", "learner version minus the oldest version in the batch when trained"),
    "rollout/tokens_per_second": MetricSpec("tokens/s", "response tokens per busy second of the slowest actor"),
    "teacher/tokens_per_second": MetricSpec("tokens/s", "prompt and response tokens read per busy second"),
    "learner/tokens_per_second": MetricSpec("tokens/s", "packed tokens, clean and noised, per training second"),
    "queue/rollout": MetricSpec("trajectories", "admitted at the start of the batch"),
    "queue/teacher": MetricSpec("record batches", "most that waited for targets at once"),
    "queue/learner": MetricSpec("record batches", "handed to the learner"),
    "seconds/rollout": MetricSpec("s", "busy seconds of the busiest rollout actor"),
    "seconds/teacher": MetricSpec("s", "busy seconds of the busiest teacher"),
    "seconds/learner": MetricSpec("s", "training seconds"),
    "seconds/publish": MetricSpec("s", "gathering, shipping and, at staleness 0, loading the weights"),
    "seconds/batch": MetricSpec("s", "wall time of the batch"),
    "bytes/trajectories": MetricSpec("bytes", "Arrow record batches with targets"),
    "bytes/weights": MetricSpec("bytes", "published weights"),
}


class RunLog:
    """Appends to `metrics.jsonl` (one object per rollout batch) and to TensorBoard events in `tensorboard/`."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        self._events_dir = run_dir / "tensorboard"

    def __enter__(self) -> RunLog:
        from torch.utils.tensorboard import SummaryWriter

        self._file: IO[str] = self._path.open("a")
        self._events = SummaryWriter(str(self._events_dir))
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._events.close()

    def batch(self, metrics: dict[str, float]) -> None:
        """Log one rollout batch.

        Raises:
            KeyError: a metric is not in METRICS, or one of METRICS is missing.
        """
        metrics = {**metrics, "time": time.time()}
        if metrics.keys() != METRICS.keys():
            raise KeyError(f"metrics differ from the registry: {sorted(metrics.keys() ^ METRICS.keys())}")
        self._file.write(json.dumps({name: metrics[name] for name in METRICS}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name not in ("batch", "time"):
                self._events.add_scalar(name, value, int(metrics["batch"]))
        self._events.flush()
