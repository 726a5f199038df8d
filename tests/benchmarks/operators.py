"""Where the time of a call goes: its kernels on CUDA, its operators on CPU, the greatest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity


class Operator(NamedTuple):
    """Mean of one pass; `seconds` without what it calls itself."""

    name: str
    seconds: float
    calls: float


def hottest(run: Callable[[], int], device: str, most: int = 25) -> list[Operator]:
    """Of a call that returns how many passes it made; it should have run before, so that all is warm."""
    cuda = device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        passes = run()
        if cuda:
            torch.cuda.synchronize()
    operators = [
        Operator(
            event.key[:90],
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / passes,
            event.count / passes,
        )
        for event in profiler.key_averages()
    ]
    return sorted((o for o in operators if o.seconds), key=lambda o: -o.seconds)[:most]


def table(operators: list[Operator]) -> str:
    """Lines of milliseconds, share of those listed, calls and name."""
    total = sum(operator.seconds for operator in operators)
    return "\n".join(
        f"{1e3 * o.seconds:10.3f} ms a pass {o.seconds / total:6.1%} in {o.calls:7.1f} calls  {o.name}"
        for o in operators
    )
