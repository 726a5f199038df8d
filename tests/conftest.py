"""Shared fixtures: a quiet private Ray, and one thread per process."""

import os
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest
import torch
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # times say nothing while other work runs
settings.load_profile("shared machine")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; read when it is imported


@pytest.fixture(scope="module")
def ray_local():
    """A Ray of two CPUs on this machine for the tests of a file; a test's actors end with the names that hold them."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def opdlm(monkeypatch, capsys):
    """Runs a command in this process; returns status, standard output, standard error."""

    from deploy import cli

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opdlm", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call
