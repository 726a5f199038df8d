"""The fused forward of a decoding pass gives what transformers' own gives, and leaves the same cache behind."""

import pytest
import torch

from actors.sampler import attention, fused_decoder
from actors.sampler.cache import CacheRows, SlotCache
from actors.sampler.fused_decoder import FusedDecoder
from actors.sampler.projections import pack_projections
from common.config.adapter import PROJECTIONS
from common.lora import adapter_parameters, load_adapters
from common.student import hidden_states, load_model
from tests.adapters import with_adapters
from tests.models import FAMILIES, tiny_family, tiny_qwen3

BLOCK, SLOTS, LENGTH = 4, 3, 32
CASES = {
    **{family: (family, {}) for family in FAMILIES},
    "qwen3-sliding": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "llama-threes": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "gemma3-wide-window": ("gemma3", {"sliding_window": 512}),
}


def packed_model(path, case):
    """With norms and biases unlike those that a new model has, which would hide errors."""
    family, changes = CASES[case]
    model = load_model(tiny_family(path, family, seed=3, **changes), torch.float32, "sdpa").requires_grad_(False)
    model.set_attn_implementation(attention.register())
    pack_projections(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter += 0.2 * torch.randn_like(parameter)
        elif "bias" in name:
            parameter.copy_(torch.randn_like(parameter))
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


@pytest.mark.parametrize("kernels", [False, True], ids=["references", "kernels"])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_transformers_forward_at_the_wanted_positions(case, kernels, tmp_path, monkeypatch):
    if kernels:  # in Triton's interpreter
        pytest.importorskip("triton")
        monkeypatch.setattr(fused_decoder, "in_kernels", lambda x: True)
    model = packed_model(tmp_path, case)
    wanted = torch.tensor([0, 3, 5, 11])
    assert FusedDecoder.misfit(model) is None
    fused = FusedDecoder(model, compiled=False)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def plain(ids, positions, rows):
        return hidden_states(model, ids, positions, mask, cache_rows=rows).flatten(0, 1)[wanted]

    for _ in range(2):  # the second time with new weights, copied in place
        got = forward_and_cache(model, lambda *args: fused(*args, wanted))
        torch.testing.assert_close(got, forward_and_cache(model, plain), atol=1e-5, rtol=1e-5)
        for parameter in model.parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("targets", [PROJECTIONS, ("k_proj", "down_proj", "up_proj"), ("o_proj",)])
def test_gated_adapters_act_at_the_masked_positions(targets, tmp_path):
    model = with_adapters(load_model(tiny_qwen3(tmp_path), torch.float32, "sdpa"), targets=targets)
    model.requires_grad_(False)
    unpacked = [p.clone() for p in adapter_parameters(model).values()]
    model.set_attn_implementation(attention.register())
    wanted, masked = torch.tensor([0, 3, 5, 11, 14]), torch.zeros(4, BLOCK, dtype=torch.bool)
    masked[0, 2:] = masked[1] = True
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def plain(*args, masked=masked):
        ids, positions, rows = args
        return hidden_states(model, ids, positions, mask, masked, cache_rows=rows).flatten(0, 1)[wanted]

    expected = forward_and_cache(model, plain)
    without = forward_and_cache(model, lambda *args: plain(*args, masked=None))
    pack_projections(model)
    torch.testing.assert_close(forward_and_cache(model, plain), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(model).values(), unpacked, strict=True))
    assert FusedDecoder.misfit(model) is None
    fused = FusedDecoder(model, compiled=False)
    got = forward_and_cache(model, lambda *args: fused(*args, wanted, masked))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got[0][:3] - without[0][:3]).abs().max() > 0.01
    assert torch.equal(got[0][3:], forward_and_cache(model, lambda *args: fused(*args, wanted))[0][3:])  # slot 2
    # a new version is copied into the packed memory
    load_adapters(model, [(name, torch.zeros_like(p)) for name, p in adapter_parameters(model).items()])
    got = forward_and_cache(model, lambda *args: fused(*args, wanted, masked))
    torch.testing.assert_close(got, without, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_fused_is_named(tmp_path):
    model = packed_model(tmp_path, "llama")
    model.config.hidden_act = "relu"
    assert FusedDecoder.misfit(model) == "its activation 'relu' is not one of silu, gelu_pytorch_tanh"
    model.config.hidden_act = "silu"
    down = model.model.layers[2].mlp
    down.up_proj = torch.nn.Linear(64, 128)
    assert FusedDecoder.misfit(model) == "the projections of its mlp are not plain linear layers"
    model.config.model_type = "olmo"
    assert FusedDecoder.misfit(model).startswith("model_type 'olmo' is not one of llama, mistral")
