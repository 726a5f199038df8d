"""What the learner gives DeepSpeed, and the user's keys over it."""

from typing import Any

import pytest

from common.config.learner import LearnerConfig
from learner.deepspeed_config import WHOLE_ELEMENTS, deepspeed_config, keeps_whole


def made(on_gpu: bool, **over: Any) -> dict[str, Any]:
    return deepspeed_config(LearnerConfig(lr=1e-3, deepspeed=over), on_gpu)


def test_users_keys_win_and_leave_the_others():
    config = made(False, zero_optimization={"reduce_bucket_size": 7}, optimizer={"params": {"amsgrad": True}})
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 3
    assert config["optimizer"]["params"]["amsgrad"] and config["optimizer"]["params"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("on_gpu", "params", "fused"),
    [(True, {}, True), (True, {"fused": False}, False), (True, {"torch_adam": False}, None), (False, {}, None)],
)
def test_torchs_fused_kernel_is_for_torchs_adam_on_gpus(on_gpu, params, fused):
    assert made(on_gpu, optimizer={"params": params})["optimizer"]["params"].get("fused") == fused


def test_compiled_layers_use_the_plain_linear_layer():
    def plain(on_gpu: bool, **learner: bool) -> bool:
        zero = deepspeed_config(LearnerConfig(**learner), on_gpu)["zero_optimization"]
        return not zero["memory_efficient_linear"]

    assert plain(True, compile=True)
    assert not plain(True) and not plain(False, compile=True)


def test_small_models_are_whole_on_every_rank_unless_the_user_says_otherwise():
    def whole(parameters: int, **zero: Any) -> bool:
        return keeps_whole(LearnerConfig(deepspeed={"zero_optimization": zero}), parameters)

    assert whole(WHOLE_ELEMENTS) and not whole(WHOLE_ELEMENTS + 1)
    assert not whole(100, stage3_model_persistence_threshold=99)
    assert not whole(100, offload_optimizer={"device": "cpu"})
    zero = deepspeed_config(LearnerConfig(), True, whole=True)["zero_optimization"]
    assert zero["stage3_model_persistence_threshold"] == 0 and not zero["memory_efficient_linear"]
