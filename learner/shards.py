"""The shard of one learner rank: its part of the weights in float32 and of the optimizer's states.

It is kept as safetensors and not in DeepSpeed's own files: these are pickles, which run code when they are read, and
DeepSpeed writes them while training waits. DeepSpeed's checkpoint engines that write beside the training were left out:
they need libraries of their own, and read pickles all the same.

| name | dtype | meaning |
| --- | --- | --- |
| `N.weights` | float32 [n] | sub-group N of the flat weights |
| `N.exp_avg`, `N.exp_avg_sq` | float32 [n] | moments of AdamW |
| `N.step`, `group-N.step` | float32 or int64 [] | updates of AdamW |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = re.compile(r"(?:group-)?[0-9]+\.step")
_DTYPES = ((torch.float32, torch.int64), (torch.float32,))  # of steps; of weights and moments


def shard(engine: Any) -> dict[str, Tensor]:
    """The shard of a DeepSpeed ZeRO-3 engine, as it is, not copied; before the first update the weights only."""
    tensors = _weights(engine)
    optimizer = engine.optimizer.state_dict()["optimizer_state_dict"]
    for i, states in optimizer["state"].items():
        tensors |= {f"{i}.{key}": torch.as_tensor(value) for key, value in states.items()}
    for i, group in enumerate(optimizer["param_groups"]):
        if "step" in group:  # some optimizers count once for a group
            tensors[f"group-{i}.step"] = torch.as_tensor(group["step"])
    return tensors


def restore(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take over a shard, and gather the weights from all ranks' shards; collective.

    Raises:
        ValueError: it is not of this model and number of ranks; names the tensor.
    """
    weights = _weights(engine)
    check_shard(weights, tensors)
    optimizer = engine.optimizer
    state = optimizer.state_dict()
    states: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        place, key = name.split(".")
        if name in weights:
            continue
        # a plain number where the optimizer counts in one
        value = int(tensor) if tensor.dtype == torch.int64 else tensor
        if place.startswith("group-"):
            state["optimizer_state_dict"]["param_groups"][int(place[6:])][key] = value
        else:
            states.setdefault(int(place), {})[key] = value
    state["optimizer_state_dict"]["state"] = states
    state["fp32_flat_groups"] = [tensors[name] for name in weights]
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([state] * torch.distributed.get_world_size())
    optimizer.checkpoint_event_epilogue()


def discard_gradients(engine: Any) -> None:
    """Forget the gradients of an update that is not made, as DeepSpeed does for one whose norm is not finite."""
    engine.optimizer._pre_step()
    engine.optimizer._overflow_clean_up(engine.optimizer.loss_scale)


def _weights(engine: Any) -> dict[str, Tensor]:
    return {f"{i}.weights": flat.detach() for i, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat)}


def check_shard(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no shard beside these `weights`, or that are not finite.

    Raises:
        ValueError: names the tensor.
    """
    expected = {name: tensor.shape for name, tensor in weights.items()}
    if any("exp_avg" in name for name in tensors):
        expected |= {name.replace("weights", key): shape for name, shape in expected.items() for key in _MOMENTS}
    for name in expected:
        if name not in tensors:
            raise ValueError(f"tensor {name!r} is missing")
    for name, tensor in tensors.items():
        shape = torch.Size([]) if _STEP.fullmatch(name) else expected.get(name)
        if shape is None:
            raise ValueError(f"tensor {name!r} is not known")
        if tensor.shape != shape or tensor.dtype not in _DTYPES[name in expected]:
            dtype = " or ".join(str(dtype) for dtype in _DTYPES[name in expected])
            raise ValueError(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} holds values that are not finite")


def shard_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def write_shard(folder: Path, rank: int, ranks: int, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), shard_file(folder, rank), {"rank": str(rank), "ranks": str(ranks)})


def read_shard(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    """The shard that `rank` of `ranks` wrote.

    Raises:
        ValueError: the file is missing, damaged, or of another number of ranks; says what to do.
    """
    file = shard_file(folder, rank)
    if not file.is_file():
        raise ValueError(
            f"{str(file)!r} is missing: the checkpoint is of an earlier release, or of fewer ranks; go on with the "
            "release and learner.ranks that wrote it"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            written = (opened.metadata() or {}).get("ranks")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}); go on from another checkpoint") from error
    if written != str(ranks):
        raise ValueError(f"{str(file)!r} was written by {written} ranks; go on with learner.ranks {written}")
    return tensors


class HostCopy:
    """Copies of tensors in this process's memory, page-locked for tensors of a GPU.

    The buffers are made once: locking pages takes longer than to fill them. A copy is valid until the next is taken.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.reserve(tensors)
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in tensors}
