"""Models with experts: sizes, files, and what is refused; test_families.py has sampler, parity and training."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config.errors import ConfigError
from common.config.file import load_config
from common.conversion import check_weights
from common.model_files import ModelError
from common.student import load_model
from deploy.model_checks import check_models
from deploy.placement import model_shape
from tests.models import EXPERTS, tiny_family


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_family(tmp_path_factory.mktemp("model") / "moe", "qwen3-moe")


def test_sizes_are_the_models(folder):
    shape = model_shape("model.path", folder, None)
    model = load_model(folder, torch.float32, "sdpa")
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.parameters == model.num_parameters() - norms
    idle = EXPERTS["num_experts"] - EXPERTS["num_experts_per_tok"]
    assert shape.parameters - shape.active_parameters == 3 * idle * 3 * 64 * EXPERTS["moe_intermediate_size"]


def test_an_expert_that_is_missing_or_of_another_size_is_refused(folder, tmp_path):
    check_weights(folder)
    broken = tiny_family(tmp_path / "broken", "qwen3-moe")
    tensors = load_file(f"{broken}/model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    expert = tensors.pop(name)
    save_file(tensors, f"{broken}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 of the .* the first is {name}"):
        check_weights(broken)
    save_file(tensors | {name: expert[:-1].clone()}, f"{broken}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        check_weights(broken)


@pytest.mark.parametrize(
    ("field", "others"),
    [
        ("rollout.cuda_graphs", []),
        ("rollout.compile", ["--rollout.cuda_graphs", "false"]),
        ("learner.compile", ["--rollout.cuda_graphs", "false", "--rollout.compile", "false"]),
    ],
)
def test_captured_passes_are_refused_on_gpus(folder, field, others):
    options = ["--model.path", folder, "--teacher.backend", "transformers", "--learner.compile", "true"]
    check_models(load_config("tiny", options))  # on a CPU nothing is captured
    gpus = ["--rollout.resources.gpus", "1", "--learner.resources.gpus", "1"]
    with pytest.raises(ConfigError, match=rf"{field}: model.path .* routes each token to experts .* set {field} to"):
        check_models(load_config("tiny", [*options, *gpus, *others]))
