"""The config's own rules: what it refuses, and that it loads without heavy libraries."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from common.config.fields import leaves
from common.config.learner import LearnerConfig
from common.config.model import ModelShape
from common.config.run import RunConfig
from common.config.schedule import CurriculumConfig


def run_config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"prompts": "p"}, **changes})


def test_config_and_help_load_neither_torch_nor_ray():
    code = """
import sys
import common.config.run, common.config.file, deploy.cli
sys.argv = ["opdlm", "train", "--help"]
try:
    deploy.cli.main()
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "ray", "transformers", "deepspeed", "vllm"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--learner.lr" in done.stdout


def test_every_field_says_what_it_means():
    tags = ("rule", "kind")
    silent = [path for path, _, field in leaves() if not field.description and path.rsplit(".", 1)[-1] not in tags]
    assert silent == []


def test_block_size_must_divide_the_curriculum():
    with pytest.raises(ValidationError, match=r"block_size \(8\) does not divide curriculum.min_tokens \(100\)"):
        run_config(block_size=8)


def test_steps_per_block_must_divide_the_block():
    unmasking = {"rule": "static", "steps_per_block": 3}
    with pytest.raises(ValidationError, match=r"steps_per_block \(3\) does not divide block_size \(4\)"):
        run_config(rollout={"unmasking": unmasking})


def test_dropped_tail_fits_forward_kl_only():
    topk = {"target": "topk"}
    run_config(teacher=topk, objective={"topk_tail": "drop"})
    run_config(teacher=topk, objective={"divergence": {"kind": "reverse_kl"}})
    with pytest.raises(ValidationError, match=r"set objective.topk_tail to 'bucket' or teacher.target to 'hidden'"):
        run_config(teacher=topk, objective={"divergence": {"kind": "reverse_kl"}, "topk_tail": "drop"})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (LearnerConfig, {"ranks": 4, "batch_rows": 2}, r"batch_rows \(2\) is below ranks \(4\)"),
        (LearnerConfig, {"lr": 1e-6, "min_lr": 1e-5}, "min_lr"),
        (CurriculumConfig, {"min_tokens": 8, "max_tokens": 4}, r"min_tokens \(8\) is above max_tokens \(4\)"),
    ],
)
def test_fields_of_a_section_must_agree(section, values, message):
    with pytest.raises(ValidationError, match=message):
        section(**values)


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a b", ""])
def test_a_run_name_is_one_plain_folder(name):
    with pytest.raises(ValidationError):
        run_config(name=name)


def test_weights_transport_follows_the_devices():
    def decided(transport: str, learner: float, rollout: float) -> str:
        gpus = {role: {"resources": {"gpus": n}} for role, n in (("learner", learner), ("rollout", rollout))}
        return run_config(publish={"transport": transport}, **gpus).weights_transport

    assert run_config().weights_transport == "object_store"
    assert decided("auto", 1, 1) == "broadcast"
    for learner, rollout in ((0, 0), (0.5, 1), (1, 0)):
        assert decided("auto", learner, rollout) == "object_store"
    assert decided("broadcast", 0, 0) == decided("broadcast", 2, 1) == "broadcast"
    with pytest.raises(ValidationError, match=r"set publish\.transport to 'object_store'"):
        decided("broadcast", 0.5, 0.5)


def test_shape_counts_the_parameters_of_qwen3():
    shape = ModelShape(
        hidden_size=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
    )
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert shape.parameters + norms == 596_049_920  # the size of Qwen3-0.6B's safetensors
    assert shape.kv_elements_per_token == 2 * 28 * 8 * 128


def test_sections_do_not_change_after_validation():
    config = run_config()
    with pytest.raises(ValidationError):
        config.block_size = 8
