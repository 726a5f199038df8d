"""A rank's whole copy of the student beside its ZeRO-3 shard, for models that are small enough.

DeepSpeed runs Python for every parameter and layer in forward, backward and step. For small models that is most of an
update: of 0.19 s for SmolLM2-135M on an H100 the GPU computed 0.066 s. So where all weights are whole on a rank anyway,
forward and backward run on plain parameters without hooks, and DeepSpeed's optimizer gets all gradients at once. Its
shards of master weights and Adam states stay what is stepped, partitioned over the ranks and saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_NORM_CHUNK = 2**25  # DeepSpeed takes the norm of a tensor in float64, in a copy


class WholeWeights:
    """Whole parameters and gradients of one rank, and their way to DeepSpeed's shards and back.

    With N ranks ZeRO-3 cuts a parameter of n elements into N parts of ceil(n / N), the last one padded, and rank r's
    shard is part r of all parameters, one after another. Here a parameter lies whole in a flat buffer, its padding
    behind it; with one rank that buffer is the shard itself.

    Attributes:
        student: what is trained of its parameters are views into the flat buffer, their `grad` into another.
    """

    def __init__(self, student: PreTrainedModel, names: Mapping[int, str], optimizer: Any) -> None:
        """Args:
        student: gets the parameters in place of its own.
        names: by the id of each parameter in a DeepSpeed ZeRO-3 engine, the student's name for it.
        optimizer: of that engine.
        """
        self.optimizer = optimizer
        self.ranks = torch.distributed.get_world_size()
        self.student = student
        shards = list(optimizer.fp16_partitioned_groups_flat)
        self._parameters: list[Tensor] = []  # of one sub-group after the other, with padding, [ranks, part]
        self._gradients: list[Tensor] = []
        self._groups: list[slice] = []  # for each sub-group of the optimizer: its slice of the two lists
        self._gradients_flat = [torch.zeros_like(shard).repeat(self.ranks) for shard in shards]
        for group, shard, gradients in zip(optimizer.fp16_groups, shards, self._gradients_flat, strict=True):
            whole = shard if self.ranks == 1 else torch.empty_like(gradients)
            start, first = 0, len(self._parameters)
            for parameter in group:
                padded = slice(start, start + self.ranks * parameter.ds_tensor.numel())
                start = padded.stop
                plain = nn.Parameter(whole[padded][: parameter.ds_numel].view(parameter.ds_shape))
                plain.grad = gradients[padded][: parameter.ds_numel].view(parameter.ds_shape)
                _set(self.student, names[id(parameter)], plain)
                self._parameters.append(whole[padded].view(self.ranks, -1))
                self._gradients.append(gradients[padded].view(self.ranks, -1))
            self._groups.append(slice(first, len(self._parameters)))
        self.student.tie_weights()
        self.gather()

    def clear_gradients(self) -> None:
        for gradients in self._gradients_flat:
            gradients.zero_()

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """Sum the gradients over the ranks and give each rank's part to its optimizer. Collective."""
        from deepspeed import comm

        for i, group in enumerate(self._groups):
            part = self._gradients_flat[i]
            if self.ranks > 1:
                send = torch.cat(self._gradients[group], dim=1)
                part = send.new_empty(send.shape[1])
                comm.reduce_scatter_fn(part, send.view(-1))
            chunk = max(_NORM_CHUNK, math.ceil(len(part) / len(self.optimizer.fp16_groups[i])))
            self.optimizer.averaged_gradients[i] = list(part.split(chunk))

    @torch.no_grad()
    def gather(self) -> None:
        """Take the weights of all shards, after a step or a load. Collective."""
        from deepspeed import comm

        if self.ranks == 1:
            return  # the parameters are views of the shard
        for shard, group in zip(self.optimizer.fp16_partitioned_groups_flat, self._groups, strict=True):
            parameters = self._parameters[group]
            gathered = shard.new_empty(self.ranks, len(shard))
            comm.allgather_fn(gathered.view(-1), shard)
            parts = gathered.split([parameter.shape[1] for parameter in parameters], dim=1)
            torch._foreach_copy_(parameters, list(parts))


def emptied(partitioned: PreTrainedModel) -> PreTrainedModel:
    """A student like `partitioned`, without memory for its parameters."""
    with torch.device("meta"):
        student = type(partitioned)(partitioned.config)
    for name, buffer in partitioned.named_buffers():
        _set(student, name, buffer)
    student.generation_config = partitioned.generation_config
    return student.train(partitioned.training)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    if isinstance(value, nn.Parameter):
        setattr(model.get_submodule(owner), leaf, value)
    else:
        model.get_submodule(owner).register_buffer(leaf, value, persistent=False)
