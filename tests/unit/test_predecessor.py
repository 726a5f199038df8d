"""The benchmark beside the released code, with a few lines in the place of that code."""

import json
import os
import sys
from importlib.util import find_spec
from unittest import mock

import pytest
import torch

from common.config.errors import ConfigError
from tests.benchmarks import predecessor, released_code
from tests.benchmarks.tokenizers import benchmark_tokenizer

CONFIG = """
wandb: {enabled: true}
experiment: {project: there, total_step: -1, save_every: 10, current_epoch: 1}
model: {pretrained_model: a, teacher_model: b}
training: {batch_size_lm: 4, method: TraceRL}
optimizer: {params: {learning_rate: 1e-5, epsilon: 1e-8}}
lr_scheduler: {params: {learning_rate: "${optimizer.params.learning_rate}"}}
"""
TRAINER = """
import json
from models import SDARForCausalLM
asked = []
def init_training(config):
    assert SDARForCausalLM is None and not hasattr(config.training, "lora")
    return config
def train_one_step(state, config):
    assert state is config
    rows = json.load(open(config.experiment.project + "/temp_data/rl_data.json"))
    asked.append((config, rows))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    benchmark_tokenizer("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def checkout(tmp_path):
    for name, text in (("configs/rl_bd3lm.yaml", CONFIG), ("train/rl_sdar.py", TRAINER)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    with mock.patch.dict(os.environ), mock.patch.dict(sys.modules), mock.patch.object(sys, "path", sys.path[:]):
        yield tmp_path


def test_its_trainer_gets_the_settings_of_its_launchers_and_texts_of_as_many_tokens(checkout, tokenizer):
    student = checkout / "student"
    row = released_code.update(str(checkout), str(student), str(tokenizer), "cpu", 8, 16, 32, "cpu", 24)
    assert row["seconds"] > 0 and row["rows"] == 8 and row["tokens"] == 8 * (16 + 2 * 32) and row["whole_seconds"] > 0
    asked = sys.modules["rl_sdar"].asked
    assert [len(rows) for _, rows in asked] == [8, 8, 8, 8, 24]
    config, rows = asked[0]
    assert (config.training.gradient_accumulation_steps, config.training.batch_size_lm) == (8, 1)
    assert config.training.one_state_per_block and config.training.method == "TraceRL"
    assert config.training.offload_optimizer_device == config.training.offload_param_device == "cpu"
    assert (config.model.pretrained_model, config.model.teacher_model) == (str(student), str(tokenizer))
    assert config.optimizer.params.learning_rate == config.lr_scheduler.params.learning_rate == 1e-5
    encode = benchmark_tokenizer("tiny")
    assert (len(encode(rows[0]["prompt"]).input_ids), len(encode(rows[0]["response"]).input_ids)) == (16, 32)
    blocks = [sorted(rows[0]["step_map"][i : i + 4]) for i in range(0, 32, 4)]
    assert blocks == [list(range(i, i + 4)) for i in range(0, 32, 4)]


def test_what_is_missing_and_nothing_else_is_replaced(checkout, monkeypatch):
    monkeypatch.setattr(released_code, "find_spec", lambda name: None if name in ("flash_attn", "liger_kernel") else 1)
    assert released_code._stand_ins("flash_attn", "wandb", "liger_kernel") == ["flash_attn", "liger_kernel"]
    assert "wandb" not in sys.modules or sys.modules["wandb"].__file__
    assert find_spec("flash_attn").name == "flash_attn"  # which fails for a module without its specification
    from flash_attn import flash_attn_with_kvcache
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    assert flash_attn_with_kvcache is released_code._paged_attention
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(LigerSiLUMulFunction.apply(gate, up), gate * gate.sigmoid() * up)


def test_its_engine_reads_a_config_by_older_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "head_dim": 128, "dtype": "bfloat16"}))
    config = released_code._engine_config(str(tmp_path), trust_remote_code=True)
    assert (config.model_type, config.head_dim, config.rope_scaling) == ("qwen3", 128, None)
    assert config.torch_dtype.itemsize == 2


def test_rows_have_both_seconds_and_their_ratio(checkout, monkeypatch):
    seconds = {"sample": 40.0, "update": 2.0, "_sample": 5.0, "_targets": 0.1, "_update": 0.4}

    def alone(call, *arguments):
        if call.__module__ != released_code.__name__:
            return seconds[call.__name__]
        whole = {"whole_seconds": 30.0} if arguments[-1] == 128 else {}
        return {"seconds": seconds[call.__name__], "replaced": ["wandb"]} | whole

    monkeypatch.setattr(predecessor, "_alone", alone)
    monkeypatch.setattr(predecessor, "_folders", lambda *_: ("ours", "theirs"))
    rows = list(predecessor.measure("0.6b", "cuda", 128, 128, 512, str(checkout), None))
    whats = ["sampler", "update", "rollout batch", "update, offloaded as released"]
    assert [row["what"] for row in rows] == whats
    assert rows[1]["ratio"] == rows[3]["ratio"] == pytest.approx(4) and rows[1]["replaced"] == ["wandb"]
    assert (rows[2]["released_s"], rows[2]["ours_s"]) == (40 + 30, pytest.approx(5 + 16 * 0.5))
    on_cpu = list(predecessor.measure("tiny", "cpu", 8, 16, 32, str(checkout), None))
    assert [row["what"] for row in on_cpu] == ["update", "update, offloaded as released"]


def test_without_a_checkout_nothing_is_measured(tmp_path):
    for reference in (None, str(tmp_path)):
        with pytest.raises(ConfigError, match=r"--reference: .* is no checkout of divelab/OPDLM; give the folder"):
            next(predecessor.measure("tiny", "cpu", 8, 16, 32, reference, None))
