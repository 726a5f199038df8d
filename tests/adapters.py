"""Models with adapters that do something."""

import torch

from common.config.adapter import AdapterConfig
from common.lora import adapter_parameters, add_adapters


def with_adapters(model, gate: str = "mask", rank: int = 3, **fields):
    """`model` with adapters whose B is drawn, not 0."""
    add_adapters(model, AdapterConfig(rank=rank, alpha=rank * 2, gate=gate, **fields))
    draw_updates(model)
    return model.eval()


def draw_updates(model) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
