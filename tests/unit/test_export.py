"""Exported folders: token for token what our sampler writes, where this project is not installed; and who refuses
them."""

import json
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, pipeline

from actors.evaluation.generation import load_student, sampler_of
from actors.sampler.request import Request
from actors.sampler.sampling import Decoding
from common.config.file import REPOSITORY
from common.conversion import convert_folder
from common.student import load_tokenizer
from deploy.evaluation.decoding_options import unmasking_of
from deploy.export.block_diffusion import BlockDiffusion
from deploy.export.exported_folder import read_student, write_exported
from deploy.export.hf import write_hf
from deploy.export.sdar import write_sdar
from tests.models import tiny_family

LIMIT, SEED, THRESHOLD = 18, 5, 0.2
ENDS = [258, *range(0, 256, 16)]
EXPORTS = {  # family, format, attention context
    "llama": ("llama", write_hf, "causal"),
    "qwen3": ("qwen3", write_hf, "causal"),
    "qwen3 in blocks": ("qwen3", write_hf, "block"),
    "sdar": ("qwen3", write_sdar, "block"),
    "qwen3-moe": ("qwen3-moe", write_hf, "block"),
    "qwen2-sliding": ("qwen2-sliding", write_hf, "causal"),
    "mistral-sliding": ("mistral-sliding", write_hf, "block"),
    "gemma3": ("gemma3", write_hf, "causal"),
}
WHOLE = ("llama", "qwen3", "sdar")  # with several prompts and block sizes


def student(folder: Path, family: str, context: Any, **changes: Any) -> Path:
    arlm = tiny_family(folder / "arlm", family, seed=3, **changes)
    convert_folder(arlm, folder / "student", 4, "auto", torch.float32, context=context)
    return folder / "student"


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 256, length).tolist()


def expected(folder: Path, asked: list[dict[str, Any]]) -> list[list[int]]:
    """What our sampler writes."""
    model, tokenizer = load_student(str(folder), "float32")
    responses = []
    for one in asked:
        sampler = sampler_of(model, tokenizer, block_size=one["block_size"], slots=1, seed=SEED)
        sampler.eos_token_id = one["eos_token_id"]
        sampler.device_pass._end_tokens = torch.tensor(one["eos_token_id"])
        rule = unmasking_of(one["rule"], THRESHOLD, draft_rounds=one["draft_rounds"])
        decoding = Decoding(rule, one["temperature"], one["top_k"], one["top_p"])
        (made,) = sampler.generate([Request(0, 0, np.array(one["prompt"]), LIMIT)], decoding)
        responses.append(made.response_ids.tolist())
    return responses


def elsewhere(asked: list[dict[str, Any]], cwd: Path) -> list[list[int]]:
    """What exported folders generate in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", REPOSITORY / "tests/exported_model.py", sysconfig.get_paths()["purelib"]],
        input=json.dumps(asked), capture_output=True, text=True, cwd=cwd, timeout=240,
        env={"HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "student, made by opdlm" in done.stderr, "it says where it comes from"
    return list(json.loads(done.stdout))


def asked_of(name: str) -> list[dict[str, Any]]:
    """Prompts on and off the grid, with many end tokens, so that responses stop anywhere in a block."""
    _, _, context = EXPORTS[name]
    whole = name in WHOLE
    return [
        {
            "prompt": prompt_of(length), "rule": rule, "block_size": size, "temperature": temperature, "top_k": top_k,
            "top_p": top_p, "draft_rounds": rounds, "eos_token_id": ENDS, "threshold": THRESHOLD, "seed": SEED,
            "max_new_tokens": LIMIT,
        }
        for length, (rule, rounds), (size, temperature, top_k, top_p) in product(
            [8, 9] if whole else [9],
            [("static", 1), ("dynamic", 1), *([("speculative", 1), ("speculative", 3)] if context == "causal" else [])],
            [(4, 0.0, 0, 1.0), (4, 0.8, 20, 0.9), *([(1, 0.0, 0, 1.0), (8, 0.0, 0, 1.0)] if whole else [])],
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> dict[str, list[list[int]]]:
    """What the exported folders generate, in one process."""
    folder = tmp_path_factory.mktemp("elsewhere")
    asked = []
    for name, (family, write, context) in EXPORTS.items():
        write_exported(read_student(student(folder / name, family, context)), folder / name / "out", write)
        asked += [one | {"folder": str(folder / name / "out")} for one in asked_of(name)]
    made = iter(elsewhere(asked, folder))
    return {name: [next(made) for _ in asked_of(name)] for name in EXPORTS}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_folder_writes_what_our_sampler_writes(generated, tmp_path, name):
    family, _, context = EXPORTS[name]
    ours = expected(student(tmp_path, family, context), asked_of(name))
    assert generated[name] == ours
    if name in WHOLE:
        ended = [len(asked["prompt"]) + len(r) for asked, r in zip(asked_of(name), ours, strict=True) if r[-1] in ENDS]
        assert any(length % 4 for length in ended) and any(len(r) == LIMIT for r in ours)


def test_what_does_not_know_an_exported_folder_refuses_it(opdlm, tmp_path):
    assert opdlm("export", student(tmp_path, "llama", "block"), tmp_path / "out")[0] == 0
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("opdlm_llama", ["OpdlmForCausalLM"])
    for folder in ("student", "out"):
        modes = {(tmp_path / folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}
        assert len(modes) == 1, "who may read the config may read the weights"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_opdlm_reads_checkpoints_exported_ones_and_those_of_earlier_releases(opdlm, tmp_path):
    folder = student(tmp_path, "llama", "block")
    asked = ["2 + 2?", "--max-new-tokens", 8]
    written = opdlm("generate", folder, *asked)[:2]
    assert written[0] == 0
    assert opdlm("export", folder, tmp_path / "out")[0] == 0
    assert opdlm("generate", tmp_path / "out", *asked)[:2] == written
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaBlockDiffusionForCausalLM"], "llama")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    assert opdlm("generate", folder, *asked)[:2] == written


@pytest.mark.parametrize(
    ("family", "context", "changes", "said"),
    [
        ("llama", "block", {}, "model_type 'llama', and an SDAR is a Qwen3, with norms"),
        ("qwen3", "causal", {}, "attention_context 'causal'"),
        ("qwen3", "block", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("qwen3", "block", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "qwen3", "block",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'",
        ),
    ],
)  # fmt: skip
def test_what_is_no_sdar_is_refused_with_the_reason(opdlm, tmp_path, family, context, changes, said):
    folder = student(tmp_path, family, context, **changes)
    status, out, err = opdlm("export", folder, tmp_path / "out", "--format", "sdar")
    assert (status, out) == (2, "")
    assert f"error: MODEL: '{folder}' cannot be exported as an SDAR: it has" in err and said in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["arlm", "student"]


def test_an_sdar_has_what_engines_read(opdlm, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    folder = student(tmp_path, "qwen3", "block", rope_parameters=rope)
    status, out, _ = opdlm("export", folder, tmp_path / "out", "--format", "sdar")
    assert (status, "take token 151669 for the mask, and this model's is 259" in out) == (0, True)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert (saved["architectures"], saved["model_type"]) == (["SDARForCausalLM"], "sdar")
    assert (saved["rope_theta"], saved["rope_parameters"], saved["rope_scaling"]) == (5e5, rope, None)
    assert (saved["mask_token_id"], saved["block_size"], saved["head_dim"]) == (259, 4, 32)
    assert (saved["tie_word_embeddings"], saved["eos_token_id"], saved["torch_dtype"]) == (False, [258], "float32")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [258]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as tensors:
        head, embedding = (tensors.get_tensor(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embedding)
    assert load_tokenizer(str(tmp_path / "out")).mask_token_id == 259


class BlockDiffusionLlama(BlockDiffusion, LlamaForCausalLM):
    """As the code of an exported folder has it."""


def exported_llama(folder: Path) -> BlockDiffusionLlama:
    path = student(folder, "llama", "block")
    model = BlockDiffusionLlama.from_pretrained(path)
    model.config.update(read_student(path).described())
    return model


def test_arguments_of_generate_that_mean_nothing_are_refused(tmp_path):
    model = exported_llama(tmp_path)
    prompt = torch.tensor([prompt_of(5)])
    for arguments, said in (
        ({"rule": "best"}, "'best' is none of static, dynamic, speculative"),
        ({"rule": "speculative"}, "attention_context is 'causal'"),
        ({"steps_per_block": 3}, "does not divide the block size 4"),
        ({"temperature": -1.0}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(prompt, **arguments)
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(prompt, num_beams=2)


def test_a_padded_batch_gives_each_row_its_own_response(tmp_path):
    model = exported_llama(tmp_path)
    prompts = [prompt_of(3), prompt_of(9)]
    rows = torch.tensor([[256] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(rows, mask, max_new_tokens=8)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8)[0, len(prompt) :].tolist()
        assert row[9:].tolist() == alone + [256] * (len(row) - 9 - len(alone))


def test_a_pipeline_of_transformers_decodes_by_block_diffusion(tmp_path):
    model = exported_llama(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    asked = tokenizer("2 + 2?", return_tensors="pt")["input_ids"]
    expected = model.generate(asked, max_new_tokens=12)[0, asked.shape[1] :]
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)("2 + 2?", max_new_tokens=12)
    assert made[0]["generated_text"] == "2 + 2?" + tokenizer.decode(expected, skip_special_tokens=True)
