"""The fused forward of a decoding pass gives what transformers' own gives, and leaves the same cache behind."""

import pytest
import torch

from actors.sampler import attention
from actors.sampler.cache import CacheRows, SlotCache
from actors.sampler.fused_qwen3 import FusedQwen3
from actors.sampler.projections import pack_projections
from common.student import hidden_states, load_model
from tests.models import tiny_qwen3

BLOCK, SLOTS, LENGTH = 4, 3, 32


@pytest.fixture
def model(tmp_path):
    model = load_model(tiny_qwen3(tmp_path, seed=3), torch.float32, "sdpa").requires_grad_(False)
    model.set_attn_implementation(attention.register())
    pack_projections(model)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def forward_and_cache(model, forward):
    """Of three slots' blocks, one of which commits its last block, over a cache that holds something."""
    torch.manual_seed(0)
    cache = SlotCache(model, SLOTS, LENGTH)
    for memory in (*cache.keys, *cache.values):
        memory.normal_()
    cache.attach(model)
    starts = torch.tensor([8, 0, 16, 12])
    slots, partner = torch.tensor([0, 1, 2, 2]), torch.tensor([-1, -1, 3])
    positions = starts[:, None] + torch.arange(BLOCK)
    ids = torch.randint(8, 250, positions.shape)
    with torch.inference_mode():
        out = forward(ids, positions, CacheRows(slots, positions, BLOCK, partner))
    return out, cache.keys, cache.values


@pytest.mark.parametrize("window", [None, 6])
def test_it_equals_transformers_forward_at_the_wanted_positions(model, window):
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    wanted = torch.tensor([0, 3, 5, 11])
    assert FusedQwen3.fits(model)
    fused = FusedQwen3(model, compiled=False)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def plain(ids, positions, rows):
        return hidden_states(model, ids, positions, mask, cache_rows=rows).flatten(0, 1)[wanted]

    for _ in range(2):  # the second time with new weights, copied in place
        got = forward_and_cache(model, lambda *args: fused(*args, wanted))
        torch.testing.assert_close(got, forward_and_cache(model, plain), atol=1e-5, rtol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(1.1)


def test_a_model_with_another_activation_does_not_fit(model):
    model.config.hidden_act = "gelu"
    assert not FusedQwen3.fits(model)
