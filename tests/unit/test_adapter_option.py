"""An adapter's folder beside its base model, given to `opdlm generate`, `eval` and `serve`."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config.adapter import AdapterConfig
from common.conversion import convert, convert_folder, load_converted, save_student
from common.lora import adapter_parameters
from common.student import load_model
from deploy.commands.serve import asked_in_file
from deploy.serving.loading import load_server
from tests.adapters import with_adapters
from tests.models import tiny_qwen3

QUESTION = "Tom has 5 apples. How many?"
SHORT = ("--max-new-tokens", 24, "--rule", "static")


def adapter_of(base: str, folder: Path, gate: str = "none", block_size: int = 4) -> Path:
    conversion = convert(base, block_size)
    model = with_adapters(load_converted(base, conversion, torch.float32, "sdpa"), gate)
    tensors = {name: p.detach() for name, p in adapter_parameters(model).items()}
    save_student(model, conversion, folder, block_size, tensors, AdapterConfig(rank=3, alpha=6, gate=gate), base)
    return folder


@pytest.fixture
def moved(tmp_path):
    """An adapter and its base, which lies elsewhere than the adapter says."""
    folder = adapter_of(tiny_qwen3(tmp_path / "base", seed=2), tmp_path / "adapter")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    return tmp_path / "moved", folder


@pytest.mark.parametrize("gate", ["none", "mask"])
def test_the_text_is_that_of_the_folder_that_knows_its_base(opdlm, tmp_path, gate):
    folder = adapter_of(tiny_qwen3(tmp_path / "base", seed=2), tmp_path / "adapter", gate)

    def text_of(*arguments) -> list[str]:
        status, out, err = opdlm("generate", *arguments, *SHORT)
        assert status == 0, err
        return out.split("\n")[-3:]  # something may be said when a module is loaded

    text = text_of(folder, QUESTION)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    status, _, err = opdlm("generate", folder, QUESTION, *SHORT)
    assert status == 2 and "base' does not exist" in err
    assert text_of(tmp_path / "moved", QUESTION, "--adapter", folder) == text
    convert_folder(str(tmp_path / "moved"), tmp_path / "student", 4, "auto", torch.float32)
    assert text_of(tmp_path / "student", QUESTION) != text, "the adapter acts"


def test_eval_has_the_base_as_the_original(opdlm, moved, tmp_path):
    base, folder = moved
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"question": QUESTION, "answer": "5"}) + "\n")
    status, _, err = opdlm(
        "eval", base, "--adapter", folder, "--problems", problems, "--rule", "static", "--max-new-tokens", 8,
        "--output", tmp_path / "eval.json",
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert {(row["model"], row["path"]) for row in rows} == {("original", str(base)), ("student", str(folder))}


def test_serve_loads_it_and_reads_it_again(moved):
    base, folder = moved
    options = asked_in_file({"model": str(base), "adapter": str(folder), "slots": 1, "max_length": 64}).options
    server = load_server(options)
    assert server.name == str(folder)
    adapted = load_model(str(folder), torch.float32, "sdpa", str(base)).state_dict()

    def same() -> bool:
        found = server.engine.model.state_dict()
        return all(torch.equal(tensor.cpu(), adapted[name]) for name, tensor in found.items() if name in adapted)

    async def reloaded() -> int:
        server.engine.start()
        version = await asyncio.to_thread(server.folder.reload, server.engine)
        await asyncio.to_thread(server.engine.close)
        return version

    assert same()
    server.engine.model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert not same()
    assert asyncio.run(reloaded()) == 1
    assert same()


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def no_adapter(base, folder):
    return base, base


def another_width(base, folder):
    return tiny_qwen3(base.parent / "wide", hidden=32), folder


def more_layers(base, folder):
    return tiny_qwen3(base.parent / "deep", layers=3), folder


def fewer_layers(base, folder):
    return tiny_qwen3(base.parent / "flat", layers=1), folder


def another_rank(base, folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    return base, folder


def half_of_it(base, folder):
    rewritten(folder, lambda tensors: {name: t for name, t in tensors.items() if "q_proj.lora_B" not in name})
    return base, folder


def another_block_size(base, folder):
    convert_folder(str(base), base.parent / "student", 8, "auto", torch.float32)
    return base.parent / "student", folder


def no_weights(base, folder):
    (folder / "adapter_model.safetensors").unlink()
    return base, folder


def an_adapter_of_itself(base, folder):
    return folder, folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_adapter, "holds no adapter that a run has written; give a checkpoint of a run with adapter.rank"),
        (another_width, "mlp.down_proj is 64 x 128 by A and B here, and 32 x 64 there; give the model that it was"),
        (more_layers, "model.layers.2.mlp.down_proj is there, and not adapted here"),
        (fewer_layers, "model.layers.1.mlp.down_proj is adapted here, and no layer that adapts there"),
        (
            another_rank,
            "has A and B of rank 3 and 3 at model.layers.0.mlp.down_proj, and r is 8 in",
        ),
        (half_of_it, "has only one of lora_A and lora_B of model.layers.0.self_attn.q_proj"),
        (another_block_size, "block_size is 4 here and 8 there"),
        (no_weights, "has no adapter_model.safetensors; bring it back"),
        (an_adapter_of_itself, "which is an adapter itself; give the model of that one"),
    ],
)
def test_what_does_not_fit_is_said(opdlm, moved, change, said):
    base, folder = change(*moved)
    for command in (("generate", base, QUESTION), ("serve", base)):
        status, _, err = opdlm(*command, "--adapter", folder)
        assert status == 2
        assert said in " ".join(err.split())
