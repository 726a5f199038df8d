"""A GPU that is reserved is used, or the run says that it cannot be."""

import pytest
import torch

from common.config.resources import Resources
from common.device import device_for


def test_no_gpu_reserved_means_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # another role's, on the same machine
    assert device_for("rollout", Resources(gpus=0)) == "cpu"


def test_a_reserved_gpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for("rollout", Resources(gpus=0.5)) == "cuda"


def test_a_reserved_gpu_that_torch_cannot_use_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"learner\.resources\.gpus is 1, but torch .* cannot use a GPU"):
        device_for("learner", Resources(gpus=1))
