"""The shard of one learner rank: its part of the weights in float32 and of the optimizer's states.

It is kept as safetensors and not in DeepSpeed's own files: these are pickles, which run code when they are read, and
DeepSpeed writes them while training waits. DeepSpeed's checkpoint engines that write beside the training were left out:
they need libraries of their own, and read pickles all the same.

| name | dtype | meaning |
| --- | --- | --- |
| `N.weights` | float32 [n] | sub-group N of the flat weights |
| `N.exp_avg`, `N.exp_avg_sq` | float32 [n] | moments of AdamW |
| `N.step` | float32 [] | updates of AdamW |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def shard(engine: Any) -> dict[str, Tensor]:
    """The shard of a DeepSpeed ZeRO-3 engine, as it is: nothing is copied."""
    weights = {f"{i}.weights": flat.detach() for i, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat)}
    return weights | {name: torch.as_tensor(values[key]) for name, values, key in _states(engine)}


def _states(engine: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every state of the optimizer: its name, and where it stands. Some optimizers count steps in a plain number, or
    once for a group."""
    optimizer = engine.optimizer.optimizer
    for i, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        for key in sorted(optimizer.state[flat]):
            yield f"{i}.{key}", optimizer.state[flat], key
    for i, group in enumerate(optimizer.param_groups):
        if "step" in group:
            yield f"group.{i}.step", group, "step"


def restore(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take over a shard, and gather the weights from all ranks' shards; collective.

    Raises:
        ValueError: it is not of this model, number of ranks and optimizer; names the tensor.
    """
    check_shard(shard(engine), tensors)
    for i, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
        flat.data.copy_(tensors[f"{i}.weights"])
    for name, values, key in _states(engine):
        if isinstance(values[key], Tensor):
            values[key].copy_(tensors[name])
        else:
            values[key] = type(values[key])(tensors[name].item())
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    state = {
        "loss_scaler": optimizer.loss_scaler,
        "dynamic_loss_scale": optimizer.dynamic_loss_scale,
        "overflow": False,
        "fp32_flat_groups": optimizer.fp32_partitioned_groups_flat,
    }
    optimizer.load_state_dict([state] * torch.distributed.get_world_size(), load_optimizer_states=False)
    optimizer.checkpoint_event_epilogue()


def check_shard(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse another shard than one with the names, shapes and dtypes of `own`, or with values that are not finite."""
    if wrong := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"tensor {wrong[0]!r} is {'missing' if wrong[0] in own else 'not known'}")
    for name, tensor in own.items():
        saved = tensors[name]
        if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"tensor {name!r} is {saved.dtype} {list(saved.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
        if not torch.isfinite(saved).all():
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
