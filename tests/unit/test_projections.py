"""Packed projections give what the plain ones give, under the same parameter names, also after new weights."""

import pytest
import torch
from torch import nn

from actors.sampler.projections import PackedLinear, pack_projections
from common.student import load_model
from common.weights.transport import load_weights
from tests.models import tiny_qwen3


@pytest.fixture
def models(tmp_path):
    path = tiny_qwen3(tmp_path, seed=4)
    return [load_model(path, torch.float32, "sdpa").requires_grad_(False) for _ in range(2)]


def test_packed_equals_plain_and_takes_weights_in_place(models):
    plain, packed = models
    pack_projections(packed)
    layer = packed.model.layers[0]
    assert isinstance(layer.self_attn.v_proj, PackedLinear) and isinstance(layer.mlp.up_proj, PackedLinear)
    assert [name for name, _ in packed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    ids = torch.randint(8, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed.model(ids).last_hidden_state, plain.model(ids).last_hidden_state)

    place = layer.self_attn.k_proj.weight.data_ptr()
    for parameter in plain.parameters():
        parameter.mul_(1.1)
    load_weights(packed, [(name, parameter) for name, parameter in plain.named_parameters()])
    assert layer.self_attn.k_proj.weight.data_ptr() == place
    torch.testing.assert_close(packed.model(ids).last_hidden_state, plain.model(ids).last_hidden_state)

    pack_projections(packed)  # again changes nothing
    assert layer.self_attn.k_proj.weight.data_ptr() == place


def test_biases_are_packed_too():
    owner = nn.Module()
    owner.q_proj, owner.k_proj, owner.v_proj = nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(6, 2)
    x = torch.randn(3, 6)
    expected = [owner.q_proj(x), owner.k_proj(x), owner.v_proj(x)]
    layer, model = nn.Module(), nn.Module()
    layer.self_attn, layer.mlp = owner, nn.Module()
    layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(6, 5), nn.Linear(6, 5)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([layer])
    pack_projections(model)
    torch.testing.assert_close([owner.q_proj(x), owner.k_proj(x), owner.v_proj(x)], expected)
    with pytest.raises(RuntimeError, match="called before the first one"):
        owner.k_proj(x)
