"""Where a process of a run computes: on the GPU that it reserved, or on the CPU where it reserved none."""

from __future__ import annotations

import torch

from common.config.resources import Resources


def device_for(field: str, resources: Resources) -> str:
    """`cuda` or `cpu`. `field` is the config section of the resources, for the message.

    Raises:
        RuntimeError: a GPU is reserved, and torch cannot use it; on the CPU the run would take days, without a word.
    """
    if not resources.gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"{field}.resources.gpus is {resources.gpus:g}, but torch {torch.__version__} cannot use a GPU in this "
            f"process; install a CUDA build of torch that fits the driver, or set {field}.resources.gpus to 0"
        )
    return "cuda"
