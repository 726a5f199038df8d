"""LoRA: low-rank updates of a model's linear layers, y = W x + s B A x with s = alpha / rank (Hu et al., 2106.09685).

Only A and B are trained, published and saved; the base W is shared by all versions. With the gate `mask` the update
acts at mask positions alone: elsewhere y is W x itself, so what reads clean tokens is the original, bit by bit where
the shapes are equal. Without a gate it can be merged: W + s B A in place of W.

PEFT's files are written (common/adapter_files.py), but PEFT itself is not used: it knows no gate, wraps the model in
classes of its own, and ZeRO-3, packed projections and CUDA graphs need the plain parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from common.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NAMES_BEGIN
from common.config.adapter import PROJECTIONS, AdapterConfig
from common.model_files import ModelError
from common.parameters import copy_into
from common.seeds import stream_key

_A, _B = "lora_A", "lora_B"


class Gate:
    """At which tokens of the forward under way gated updates act: bool [..., 1], as many as its input has rows; None:
    at none, and nothing of them is computed."""

    def __init__(self) -> None:
        self.masked: Tensor | None = None


class AdaptedLinear(nn.Module):
    """A linear layer with its update. `weight` and `bias` are those of the layer that it replaces; A is `lora_A`
    [rank, in], B is `lora_B` [out, rank]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, gate: Gate | None, like: Tensor) -> None:
        """`like` has the dtype and device of A and B."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale, self.gate = scale, gate
        self.lora_A = nn.Parameter(like.new_zeros(rank, base.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return with_update(linear(x, self.weight, self.bias), x, self.lora_A, self.lora_B, self.scale, self.gate)


def with_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, gate: Gate | None) -> Tensor:
    """y [..., out], and s B A x of x [..., in] where the gate lets it."""
    if gate is not None and gate.masked is None:
        return y
    updated = y + linear(linear(x, a), b) * scale
    return updated if gate is None or gate.masked is None else torch.where(gate.masked, updated, y)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A, in the dtype of W; computed in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)


def add_adapters(model: Any, config: AdapterConfig, seed: int = 0) -> None:
    """Replace the target layers of `model` by adapted ones, in place; nothing else is trained from now on.

    A is drawn as nn.Linear draws its weight, from `seed` and the layer's name alone, so that all processes draw the
    same; B is 0, so that the model stays as it was.

    Raises:
        ModelError: a target is no linear layer of the model.
    """
    model.requires_grad_(False)
    like = model.get_output_embeddings().weight
    model.adapter_gate = Gate() if config.gate == "mask" else None
    for name, base in list(_targets(model, config)):
        adapted = AdaptedLinear(base, config.rank, config.scale, model.adapter_gate, torch.empty_like(like[:0]))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, adapted)
        if adapted.lora_A.is_meta:
            continue
        generator = torch.Generator().manual_seed(stream_key(seed, *_numbers(name)) % 2**63)
        drawn = torch.rand(config.rank, base.in_features, generator=generator) * 2 - 1
        adapted.lora_A.data.copy_(drawn / math.sqrt(base.in_features))


def _numbers(name: str) -> tuple[int, int]:
    """The layer and the place among PROJECTIONS of a target."""
    parts = name.split(".")
    return int(parts[2]), PROJECTIONS.index(parts[-1])


def _targets(model: Any, config: AdapterConfig) -> Iterator[tuple[str, nn.Linear]]:
    for number, layer in enumerate(model.model.layers):
        found = {name.rpartition(".")[2]: (name, module) for name, module in layer.named_modules()}
        for target in config.targets:
            name, module = found.get(target, ("", None))
            if not isinstance(module, nn.Linear):
                raise ModelError(
                    f"has no linear layer {target!r} in layer {number}, which adapter.targets names; leave it out"
                )
            yield f"model.layers.{number}.{name}", module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of all adapted layers, by name."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in (_A, _B)}


def gate_of(model: Any) -> Gate | None:
    """The gate of a model whose adapters have one."""
    gate: Gate | None = getattr(model, "adapter_gate", None)
    return gate


def load_adapters(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy A and B of all adapted layers into the model's own memory.

    Raises:
        ValueError: one is missing, unknown, or of another shape.
    """
    copy_into(adapter_parameters(model), tensors)


class MergedWeights:
    """A plain model into which versions of an adapter without a gate are merged, each into the base weights.

    The base weights of the targets are kept in host memory, since a merged weight does not give them back.
    """

    def __init__(self, model: Any, config: AdapterConfig) -> None:
        self.scale = config.scale
        self.base = {name: module.weight.detach().to("cpu", copy=True) for name, module in _targets(model, config)}

    def load(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Merge a version into the model's own memory.

        Raises:
            ValueError: A or B of a target is missing, or one is unknown.
        """
        own = dict(model.named_parameters())
        copy_into({f"{name}.weight": own[f"{name}.weight"] for name in self.base}, self._merged(dict(tensors)))

    @torch.no_grad()
    def _merged(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            parts = [tensors.get(f"{name}.{part}") for part in (_A, _B)]
            if name not in self.base or parts[0] is None or parts[1] is None:
                raise ValueError(f"published weights of {name!r} are not A and B of a target of the adapter")
            yield f"{name}.weight", merged(self.base[name].to(parts[0].device), parts[0], parts[1], self.scale)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """A and B in an adapter's folder, by their names in the model.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        stored = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"has no {ADAPTER_WEIGHTS} that can be read ({error}); bring it back") from error
    return {name.removeprefix(NAMES_BEGIN).removesuffix(".weight"): tensor for name, tensor in stored.items()}


def write_adapter(folder: Path, config: AdapterConfig, base: str, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors; `tensors` are A and B by their names in the model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{NAMES_BEGIN}{name}.weight": t.contiguous() for name, t in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        {"format": "pt"},
    )
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(config.targets),
        "inference_mode": True,
        "opdlm_gate": config.gate,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
