"""Adapters as exported folders: merged, or alone in PEFT's files."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.adapter import AdapterConfig
from common.config.unmasking import DynamicUnmasking
from common.conversion import convert, load_converted, save_student
from common.lora import adapter_parameters, add_adapters
from common.student import load_model
from tests.models import tiny_qwen3


def adapter(folder: Path, gate: Any = "none", mask_token: str = "auto") -> Path:
    """A student that is an adapter of the tiny model, whose embedding has no spare row but for one token."""
    base = tiny_qwen3(folder / "base", vocab=263 if mask_token == "new" else 288)
    conversion = convert(base, 4, mask_token)
    config = AdapterConfig(rank=3, alpha=6, gate=gate, targets=("q_proj", "down_proj"))
    model = load_converted(base, conversion, torch.float32, "sdpa")
    add_adapters(model, config)
    torch.manual_seed(1)
    tensors = {name: torch.randn(p.shape) * 0.3 for name, p in adapter_parameters(model).items()}
    save_student(model, conversion, folder / "student", 4, tensors, config, base)
    return folder / "student"


def test_an_adapter_is_merged_into_the_weights(opdlm, tmp_path):
    folder = adapter(tmp_path)
    assert opdlm("export", folder, tmp_path / "out")[0] == 0
    merged, base = load_model(str(folder), torch.float32, "sdpa"), load_file(tmp_path / "base/model.safetensors")
    exported = load_file(tmp_path / "out/model.safetensors")
    for name, parameter in merged.named_parameters():
        assert torch.equal(exported[name], parameter), name
    assert not torch.equal(exported["model.layers.0.mlp.down_proj.weight"], base["model.layers.0.mlp.down_proj.weight"])


def test_an_adapter_alone_is_in_files_of_peft_and_the_card_decodes_it(opdlm, tmp_path, monkeypatch):
    """PEFT is not installed here: its rule, W + (alpha / r) B A, is applied by hand to what its names say."""
    folder = adapter(tmp_path)
    out = tmp_path / "out"
    assert opdlm("export", folder, out, "--format", "peft")[0] == 0
    described = json.loads((out / "adapter_config.json").read_text())
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 3, 6.0)
    assert described["base_model_name_or_path"] == "base" and "opdlm_gate" not in described
    assert not (out / "config.json").exists()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tensors = load_file(out / "adapter_model.safetensors")
    a_names = [name for name in tensors if name.endswith(".lora_A.weight")]
    assert len(a_names) == 4 and len(tensors) == 8
    for name in a_names:
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.weight.data += 6 / 3 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    card = (out / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'PeftModel.from_pretrained(base, "out").merge_and_unload()' in code
    monkeypatch.syspath_prepend(str(out))
    from block_diffusion import BlockDiffusion  # the folder's own copy

    tokenizer = AutoTokenizer.from_pretrained(out)
    place = {"__name__": "__main__", "BlockDiffusion": BlockDiffusion, "model": model, "tokenizer": tokenizer}
    exec(code[code.index("model.__class__ =") :], place)
    student, own = load_student(str(folder), "float32")
    prompt = place["asked"]["input_ids"][0].numpy()
    sampler = sampler_of(student, own, block_size=None, slots=1)
    (ours,) = sampler.generate([Request(0, 0, prompt, 128)], Decoding(DynamicUnmasking(threshold=0.9), 0.0))
    assert np.array_equal(place["made"][0, len(prompt) :].numpy(), ours.response_ids)


@pytest.mark.parametrize(
    ("gate", "mask_token", "form", "said"),
    [
        ("mask", "auto", "hf", "is an adapter with a gate, which other programs do not have"),
        ("mask", "auto", "peft", "is an adapter with a gate, which other programs do not have"),
        (
            "none",
            "new",
            "peft",
            "has an embedding of 320 rows, with one for the mask token",
        ),
    ],
)
def test_what_other_programs_cannot_have_is_refused(opdlm, tmp_path, gate, mask_token, form, said):
    folder = adapter(tmp_path, gate, mask_token)
    status, out, err = opdlm("export", folder, tmp_path / "out", "--format", form)
    assert (status, out) == (2, "") and said in err
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_no_adapter(opdlm, tmp_path):
    assert opdlm("export", adapter(tmp_path), tmp_path / "whole")[0] == 0
    status, _, err = opdlm("export", tmp_path / "whole", tmp_path / "out", "--format", "peft")
    assert status == 2 and "is a whole model and no adapter; use --format hf" in err
