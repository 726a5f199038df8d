"""Packed projections: one product gives query, key and value of a layer, and another gate and up.

A pass has few rows, so its products are small and leave most of a GPU idle; a wider product fills it better. Parameters
keep their names and become views of the packed weight, so new weights are still copied in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PACKS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))  # in the order of use


def pack_projections(model: PreTrainedModel) -> None:
    """Replace the projections of PACKS in every layer; does nothing to a model that is packed already, nor to experts,
    which have products of their own."""
    for layer in model.model.layers:
        for part, names in PACKS:
            owner = getattr(layer, part)
            found = [getattr(owner, name, None) for name in names]
            linears = [linear for linear in found if type(linear) is nn.Linear]
            if len(linears) == len(names):
                for name, packed in zip(names, _packed(linears), strict=True):
                    setattr(owner, name, packed)


class Product:
    """One product for several projections of the same input. `result` is kept from the first projection to the last."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.result: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """All projections of x [..., d], side by side in the last dimension."""
        return nn.functional.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """Outputs `start` to `end` of a product. The first of its projections computes it, the last one frees it."""

    def __init__(self, product: Product, start: int, end: int) -> None:
        super().__init__()
        self.product = product
        self.start, self.end = start, end
        self.leads, self.closes = start == 0, end == len(product.weight)
        self.weight = nn.Parameter(product.weight[start:end], requires_grad=False)
        bias = None if product.bias is None else nn.Parameter(product.bias[start:end], requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.leads:
            self.product.result = self.product.of(x)
        result = self.product.result
        if result is None:
            raise RuntimeError("a packed projection was called before the first one of its product")
        if self.closes:
            self.product.result = None
        return result[..., self.start : self.end]


def _packed(linears: list[nn.Linear]) -> list[PackedLinear]:
    product = Product(linears)
    ends = torch.tensor([linear.out_features for linear in linears]).cumsum(0).tolist()
    return [PackedLinear(product, start, end) for start, end in zip([0, *ends], ends, strict=False)]
