"""The decoder layers compiled for training: for small models most of an update would else be Python between kernels.

One graph with a symbolic width serves every layer and every micro-batch, so that uneven rows compile nothing anew. It
replaces the layer's `forward` and not the layer, since DeepSpeed gathers a layer's parameters in hooks around that.
Compiling the model as a whole was left out: thirty layers take thirty times as long to compile as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config as inductor
from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer of `model` in place; results differ from the plain ones by rounding.

    On one H100 a forward and backward of SmolLM2-135M took 64 ms for some 9,300 packed tokens in place of 172 ms.
    """
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, options=_OPTIONS)


# Fusing reductions of different orders pays from a number of tokens on, so that a graph would serve one side of it only
_OPTIONS: dict[str, Any] | None = (
    {"triton.mix_order_reduction": False} if hasattr(inductor.triton, "mix_order_reduction") else None
)
