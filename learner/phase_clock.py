"""Where the time of the learner's updates goes, phase by phase."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

# read: record batches from the object store; pack: rows of an update; copy: to the device, with masks and targets;
# optimizer: gradient norm, step and the weights' new copies; sums: loss sums over all ranks, read by the host
Phase = Literal["read", "pack", "copy", "forward", "backward", "optimizer", "sums"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseClock:
    """Seconds from each mark to the next, so that the phases of a rollout batch add up to its time.

    On a GPU the marks are events in its stream: a phase then takes as long as the stream took to get from one mark to
    the next, whether it computed or waited for Python. Work that the host does meanwhile, such as packing behind a
    backward that still runs, costs nothing. Nothing is waited for before `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Phase | None, Any]] = []

    def mark(self, phase: Phase | None) -> None:
        """What follows is of this phase; None: of no phase."""
        self._marks.append((phase, self._now()))

    def take(self) -> dict[Phase, float]:
        """Seconds of every phase since the last call; ends the phase under way, and waits for the GPU."""
        self.mark(None)
        marks, self._marks = self._marks, []
        if self._cuda:
            marks[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in pairwise(marks):
            if phase:
                seconds[phase] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
