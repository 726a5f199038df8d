"""Adapters: their update, their gate, their files, and their way into plain weights."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from actors.sampler.fused_decoder import FusedDecoder
from actors.sampler.projections import pack_projections
from actors.sampler.sampling import Decoding
from common.adapter_files import read_adapter
from common.config.adapter import AdapterConfig
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.config.unmasking import SpeculativeUnmasking
from common.conversion import convert, load_converted, save_student
from common.lora import MergedWeights, adapter_parameters, add_adapters, load_adapters
from common.masks import block_numbers, dense_mask
from common.model_files import ModelError
from common.student import hidden_states, load_model, noised_masks
from deploy import cli
from deploy.model_checks import check_models
from tests.adapters import with_adapters
from tests.models import FAMILIES, tiny_family, tiny_qwen3
from tests.unit.test_verification import context_causal, greedy, requests, sampler

MASK = 262
TEACHER = {"backend": "transformers"}


def loaded(path: str, dtype=torch.float32):
    model = load_model(path, dtype, "sdpa")
    model.config.mask_token_id = MASK
    return model


def causal_logits(model) -> torch.Tensor:
    ids = torch.arange(8, 32)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def packed_forward(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of 12 clean tokens and of a noised copy of them, context-causal, blocks of 4."""
    ids = torch.arange(8, 20).repeat(2)
    positions, copy = torch.arange(12).repeat(2), torch.arange(2).repeat_interleave(12)
    ids[[13, 14, 17, 20, 21, 22, 23]] = MASK
    ids, positions, copy = ids[None], positions[None], copy[None]
    block = block_numbers(positions, copy, 4, "causal")
    mask = dense_mask(torch.zeros_like(copy), copy, block)
    with torch.no_grad():
        hidden = hidden_states(model, ids, positions, mask, noised_masks(model, ids, copy))
    return hidden[0, :12], hidden[0, 12:]


def test_the_update_is_the_low_rank_product_and_nothing_at_first(tmp_path):
    plain, model = loaded(tiny_qwen3(tmp_path)), loaded(str(tmp_path))
    add_adapters(model, AdapterConfig(rank=3, alpha=6))
    assert torch.equal(causal_logits(model), causal_logits(plain))
    parameters = adapter_parameters(model)
    assert len(parameters) == 2 * 7 * len(model.model.layers)
    assert [p.requires_grad for p in model.parameters()].count(True) == len(parameters)
    layer = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(5, layer.in_features)
    expected = x @ (layer.weight + 2.0 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_all_processes_draw_the_same_adapter_and_another_seed_another(tmp_path):
    path = tiny_qwen3(tmp_path)
    drawn = []
    for seed in (0, 0, 1):
        model = loaded(path)
        torch.manual_seed(len(drawn))
        add_adapters(model, AdapterConfig(rank=2), seed)
        drawn.append(torch.cat([p.flatten() for p in adapter_parameters(model).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_gated_adapter_acts_at_mask_positions_only(tmp_path):
    """What reads clean tokens is the original, bit by bit; a plain forward computes nothing of the adapter, so that not
    even its NaN gets in."""
    plain, model = loaded(tiny_qwen3(tmp_path)), with_adapters(loaded(str(tmp_path)))
    assert torch.equal(causal_logits(model), causal_logits(plain))
    (clean, noised), (of_plain, noised_of_plain) = packed_forward(model), packed_forward(plain)
    assert torch.equal(clean, of_plain)
    assert (noised - noised_of_plain).abs().max() > 0.1
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(torch.nan)
    assert torch.equal(causal_logits(model), causal_logits(plain))


def test_recomputed_activations_have_the_gradients_of_kept_ones(tmp_path):
    path = tiny_qwen3(tmp_path)
    found = []
    for recompute in (False, True):
        model = with_adapters(loaded(path)).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.tensor([[9, MASK, MASK, 12]])
        masked = ids == MASK
        hidden = hidden_states(model, ids, torch.arange(4)[None], torch.ones(1, 1, 4, 4, dtype=torch.bool), masked)
        hidden.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()]))
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_adapter_is_merged_into_the_base_each_time(tmp_path, dtype):
    path = tiny_qwen3(tmp_path)
    adapted = with_adapters(loaded(path, dtype), "none")
    merged = loaded(path, dtype)
    weights = MergedWeights(merged, AdapterConfig(rank=3, alpha=6))
    tensors = {name: p.detach() for name, p in adapter_parameters(adapted).items()}
    weights.load(merged, [(name, 5 * tensor) for name, tensor in tensors.items()])  # a version before
    weights.load(merged, tensors.items())
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(causal_logits(merged), causal_logits(adapted), atol=tolerance, rtol=0.05)
    assert (causal_logits(merged) - causal_logits(loaded(path, dtype))).abs().max() > 2 * tolerance
    with pytest.raises(ValueError, match=r"published weights lack \['model.layers.0.mlp"):
        weights.load(merged, list(tensors.items())[:8])
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' are not A and B"):
        weights.load(merged, list(tensors.items())[:1])


@pytest.mark.parametrize("gate", ["none", "mask"])
@pytest.mark.parametrize("mask_token", ["auto", "new"])
def test_a_folder_holds_the_adapter_alone_and_loads_as_the_student(tmp_path, gate, mask_token):
    path = tiny_qwen3(tmp_path / "base")
    conversion = convert(path, 4, mask_token, context="causal")
    config = AdapterConfig(rank=3, alpha=6, gate=gate, targets=("q_proj", "down_proj"))
    model = load_converted(path, conversion, torch.float32, "sdpa")
    add_adapters(model, config)
    tensors = {name: torch.randn(p.shape) * 0.3 for name, p in adapter_parameters(model).items()}
    load_adapters(model, tensors.items())
    out = tmp_path / "out"
    save_student(model, conversion, out, 8, tensors, config, path)
    assert not (out / "model.safetensors").exists()
    described = json.loads((out / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["opdlm_gate"]) == (3, 6.0, gate)
    assert read_adapter(str(out)).config == config
    again = load_model(str(out), torch.float32, "sdpa")
    assert (again.config.block_size, again.config.attention_context) == (8, "causal")
    assert again.config.mask_token_id == conversion.config.mask_token_id
    assert again.generation_config.eos_token_id == list(conversion.end_tokens)
    if gate == "mask":
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    else:
        assert adapter_parameters(again) == {}
        torch.testing.assert_close(causal_logits(again), causal_logits(model), atol=1e-4, rtol=1e-4)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"is an adapter of '.*base', which is not there; bring it back"):
        load_model(str(out), torch.float32, "sdpa")


def test_a_target_that_is_no_linear_layer_is_named(tmp_path):
    model = load_model(tiny_family(tmp_path, "qwen3_moe"), torch.float32, "sdpa")
    with pytest.raises(ModelError, match=r"has no linear layer 'gate_proj' in layer 0, which adapter\.targets names"):
        add_adapters(model, AdapterConfig(rank=2))
    add_adapters(model, AdapterConfig(rank=2, targets=("q_proj", "o_proj")))


@pytest.mark.parametrize(
    ("adapter", "rest", "message"),
    [
        ({"gate": "mask"}, {}, r"adapter\.gate \('mask'\) is of an adapter, but adapter\.rank is 0"),
        ({"rank": 2, "targets": ["q_proj", "q_proj"]}, {}, r"q_proj is named twice; name it once"),
        (
            {"rank": 2, "gate": "mask"},
            {"objective": {"terms": {"autoregressive": 0.5}}},
            r"objective\.terms\.autoregressive \(0\.5\) trains how clean tokens are read",
        ),
        (
            {"rank": 2, "gate": "mask"},
            {"objective": {"extra": [{"state": {"kind": "random", "all_positions": True}}]}},
            r"objective\.extra\.0\.state trains positions that show other tokens than the mask",
        ),
        (
            {"rank": 2, "gate": "mask"},
            {"objective": {"source": {"kind": "mixture", "offline_state": {"uniform_share": 0.5}}}},
            r"objective\.source\.offline_state trains positions that show other tokens than the mask",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(adapter, rest, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(model={"path": "m"}, data={"prompts": "p"}, adapter=adapter, **rest)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_verified_text_of_a_gated_student_is_the_originals_greedy_text(tmp_path, block_size):
    path = tiny_qwen3(tmp_path, seed=2)
    plain, asked = loaded(path), requests(21)
    expected = {r.ordinal: greedy(plain, r.prompt_ids, 21) for r in asked}
    made = list(
        sampler(with_adapters(context_causal(path)), block_size).generate(asked, Decoding(SpeculativeUnmasking(), 0.0))
    )
    assert {t.ordinal: t.response_ids.tolist() for t in made} == expected
    # what is drafted is another model's
    ungated = sampler(context_causal(path), block_size).generate(asked, Decoding(SpeculativeUnmasking(), 0.0))
    drafts = {t.ordinal: t.draft_ids.tolist() for t in ungated}
    assert block_size == 1 or {t.ordinal: t.draft_ids.tolist() for t in made} != drafts


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3-moe"])
def test_verified_text_of_every_family_is_the_originals(tmp_path, family):
    path = tiny_family(tmp_path, family, seed=3)
    plain, asked = loaded(path), requests(14)
    expected = {r.ordinal: greedy(plain, r.prompt_ids, 14) for r in asked}
    student = with_adapters(context_causal(path))
    made = sampler(student).generate(asked, Decoding(SpeculativeUnmasking(draft_rounds=2), 0.0))
    assert {t.ordinal: t.response_ids.tolist() for t in made} == expected


def test_fused_passes_write_the_originals_text_too(tmp_path):
    """As on a GPU: projections packed, the fused layers, in plain PyTorch."""
    path = tiny_qwen3(tmp_path, seed=2)
    plain, asked = loaded(path), requests(21)
    expected = {r.ordinal: greedy(plain, r.prompt_ids, 21) for r in asked}
    student = with_adapters(context_causal(path)).requires_grad_(False)
    fused = sampler(student)
    pack_projections(student)
    fused.cached_model.fused = FusedDecoder(student, compiled=False)
    made = list(fused.generate(asked, Decoding(SpeculativeUnmasking(), 0.0)))
    assert {t.ordinal: t.response_ids.tolist() for t in made} == expected
    unfused = sampler(with_adapters(context_causal(path))).generate(asked, Decoding(SpeculativeUnmasking(), 0.0))
    assert {t.ordinal: t.draft_ids.tolist() for t in made} == {t.ordinal: t.draft_ids.tolist() for t in unfused}


def test_merge_writes_a_plain_model_and_refuses_a_gated_adapter(tmp_path):
    path = tiny_qwen3(tmp_path / "base")
    conversion = convert(path, 4)
    for gate in ("none", "mask"):
        model = with_adapters(load_converted(path, conversion, torch.float32, "sdpa"), gate)
        tensors = {name: p.detach() for name, p in adapter_parameters(model).items()}
        config = AdapterConfig(rank=3, alpha=6, gate=gate)
        save_student(model, conversion, tmp_path / gate, None, tensors, config, path)
    done = CliRunner().invoke(cli.app, ["merge", str(tmp_path / "none"), str(tmp_path / "out"), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    plain, adapted = load_model(str(tmp_path / "out"), torch.float32, "sdpa"), loaded(str(tmp_path / "none"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), adapted.parameters(), strict=True))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    for folder, said in (("mask", "acts at mask positions only"), ("base", "convert it first"), ("out", "no adapter")):
        refused = CliRunner().invoke(cli.app, ["merge", str(tmp_path / folder), str(tmp_path / "no")])
        assert said in str(refused.exception)
        assert not (tmp_path / "no").exists()


def test_experts_are_no_targets_of_a_run(tmp_path):
    config = RunConfig(
        model={"path": tiny_family(tmp_path, "qwen3-moe")}, data={"prompts": "p"}, adapter={"rank": 2}, teacher=TEACHER
    )
    with pytest.raises(ConfigError, match=r"has experts, and no linear layer 'gate_proj'; set adapter\.targets"):
        check_models(config)


def test_adapters_are_the_same_in_decoding_and_in_training(tmp_path):
    """The confidences of a gated student's drafts are the probabilities of the packed forward."""
    student = with_adapters(context_causal(tiny_qwen3(tmp_path, seed=2)))
    student.config.mask_token_id = MASK
    (made,) = sampler(student).generate(requests(4, [8]), Decoding(SpeculativeUnmasking(), 0.0))
    ids = torch.from_numpy(np.concatenate([made.prompt_ids, made.prompt_ids[:0], [MASK] * 4]).astype(np.int64))[None]
    positions, copy = torch.arange(12)[None], (torch.arange(12) >= 8).long()[None]
    block = block_numbers(positions, copy, 4, "causal")
    mask = dense_mask(torch.zeros_like(copy), copy, block)
    with torch.no_grad():
        hidden = hidden_states(student, ids, positions, mask, noised_masks(student, ids, copy))
        logits = hidden[0, 9:] @ student.get_output_embeddings().weight.T
    assert logits[:, :256].argmax(-1).tolist()[0] == made.draft_ids[1]
