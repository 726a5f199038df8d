"""Packed projections: one product gives query, key and value of a layer, and another gate and up.

A pass has few rows, so its products are small and leave most of a GPU idle; a wider product fills it better. Parameters
keep their names and become views of the packed weight, so new weights are still copied in place. So do the updates of
adapted layers (common/lora.py): one product with all A, and one with all B, of which each sees its own A alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.lora import AdaptedLinear, Gate, with_update

PACKS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))  # in the order of use


def pack_projections(model: PreTrainedModel) -> None:
    """Replace the projections of PACKS in every layer; does nothing to a model that is packed already, nor to experts,
    which have products of their own."""
    for layer in model.model.layers:
        for part, names in PACKS:
            owner = getattr(layer, part)
            found = [getattr(owner, name, None) for name in names]
            linears = [linear for linear in found if type(linear) in (nn.Linear, AdaptedLinear)]
            if len(linears) == len(names):
                for name, packed in zip(names, _packed(linears), strict=True):
                    setattr(owner, name, packed)


class PackedUpdate(NamedTuple):
    """The updates of a product's adapted projections together: A [ranks, d], B [outputs, ranks] by blocks."""

    a: Tensor
    b: Tensor
    scale: float
    gate: Gate | None


class Product:
    """One product for several projections of the same input. `result` is kept from the first projection to the last."""

    def __init__(self, linears: list[Any]) -> None:
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        adapted = [linear for linear in linears if isinstance(linear, AdaptedLinear)]
        self.update: PackedUpdate | None = None
        if adapted:
            blocks = [
                (linear.lora_B if isinstance(linear, AdaptedLinear) else linear.weight[:, :0]).detach()
                for linear in linears
            ]
            a = torch.cat([linear.lora_A.detach() for linear in adapted])
            self.update = PackedUpdate(a, torch.block_diag(*blocks), adapted[0].scale, adapted[0].gate)
        self.result: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """All projections of x [..., d], side by side in the last dimension."""
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.update is None else with_update(y, x, *self.update)


class PackedLinear(nn.Module):
    """Outputs `start` to `end` of a product. The first of its projections computes it, the last one frees it."""

    def __init__(self, product: Product, start: int, end: int, ranks: slice) -> None:
        """`ranks` of the product's update are its own; none where it is not adapted."""
        super().__init__()
        self.product = product
        self.start, self.end = start, end
        self.leads, self.closes = start == 0, end == len(product.weight)
        self.weight = nn.Parameter(product.weight[start:end], requires_grad=False)
        bias = None if product.bias is None else nn.Parameter(product.bias[start:end], requires_grad=False)
        self.register_parameter("bias", bias)
        if product.update and ranks.stop > ranks.start:
            self.lora_A = nn.Parameter(product.update.a[ranks], requires_grad=False)
            self.lora_B = nn.Parameter(product.update.b[start:end, ranks], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.leads:
            self.product.result = self.product.of(x)
        result = self.product.result
        if result is None:
            raise RuntimeError("a packed projection was called before the first one of its product")
        if self.closes:
            self.product.result = None
        return result[..., self.start : self.end]


def _packed(linears: list[Any]) -> list[PackedLinear]:
    product = Product(linears)
    packed, start, rank = [], 0, 0
    for linear in linears:
        end, last = start + linear.out_features, rank + (len(linear.lora_A) if isinstance(linear, AdaptedLinear) else 0)
        packed.append(PackedLinear(product, start, end, slice(rank, last)))
        start, rank = end, last
    return packed
