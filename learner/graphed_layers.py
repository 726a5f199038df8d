"""The student's layers, forward and backward, replayed as CUDA graphs: the host then launches two graphs a micro-batch.

A graph serves one width, so rows are padded to one of eight widths an octave (learner/packing.py), and each is captured
when it first comes. All graphs share one pool of memory, since no two are under way at the same time. The loss stays
outside, because the number of masked positions is different each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.masks import packed_mask, per_layer_kind
from common.student import hidden_states, noised_masks
from learner.batches import TrainingBatch


class GraphedLayers:
    """Final hidden states of a micro-batch, as a step of autograd whose backward adds to the parameters' `grad`.

    The student's parameters and their gradients must keep their places in memory.
    """

    def __init__(self, student: PreTrainedModel, windows: dict[str, int | None], attention: str) -> None:
        self.student = student
        self.windows = windows
        self.attention = attention
        self.parameters = [p for p in student.model.parameters() if p.requires_grad]
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # one for all: memory that a capture has freed serves the next on its stream
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        # autograd runs a backward only where an input wants a gradient
        self._anchor = torch.zeros((), device=student.device, requires_grad=True)

    def __call__(self, batch: TrainingBatch) -> Tensor:
        """[R, W, d]; valid until the next micro-batch of this shape."""
        shape = tuple(batch.layout.shape[1:])
        if shape not in self._graphs:
            with torch.enable_grad():  # the backward is captured too, whoever comes first
                self._graphs[shape] = _Graph(self, batch.layout)
        hidden: Tensor = _Replay.apply(self._anchor, self._graphs[shape], batch.layout)
        return hidden

    def read(self, layout: Tensor) -> Tensor:
        """The forward that is captured, from the columns of the micro-batch (learner/batches.py)."""
        ids, positions, doc, copy, block = layout
        mask = per_layer_kind(
            self.windows, lambda window: packed_mask(doc, copy, block, positions, self.attention, window)
        )
        return hidden_states(self.student, ids, positions, mask, noised_masks(self.student, ids, copy))


class _Graph:
    """Forward and backward at one shape, captured with the tensors that they read and write."""

    def __init__(self, layers: GraphedLayers, layout: Tensor) -> None:
        self.layout = layout.clone()
        pool, stream = layers.pool, layers.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and fills the libraries' workspaces
                hidden = layers.read(self.layout)
                torch.autograd.grad(hidden, layers.parameters, torch.zeros_like(hidden), allow_unused=True)
            del hidden
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
            hidden = layers.read(self.layout)
        self.grad_hidden = torch.zeros_like(hidden)
        with torch.cuda.graph(self.backward, pool=pool, stream=stream, capture_error_mode="thread_local"):
            found = torch.autograd.grad(hidden, layers.parameters, self.grad_hidden, allow_unused=True)
            pairs = [(p.grad, g) for p, g in zip(layers.parameters, found, strict=True) if g is not None]
            torch._foreach_add_([grad for grad, _ in pairs], [found for _, found in pairs])
        self.hidden = hidden.detach()  # without the activations, whose memory the other graphs use too


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: _Graph, layout: Tensor) -> Tensor:
        ctx.graph = graph
        graph.layout.copy_(layout)
        graph.forward.replay()
        return graph.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        ctx.graph.grad_hidden.copy_(grad_outputs[0])
        ctx.graph.backward.replay()
        return None, None, None
