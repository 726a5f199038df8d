"""Every role's actor class reserves the resources of its section, and its threads are set before OpenMP is loaded."""

import pytest

from actors import responder, rollout
from actors.teacher import actor as teacher
from common.config.file import load_config
from learner import rank


@pytest.mark.parametrize(
    ("role", "module", "more"),
    [
        ("rollout", rollout, {}),
        ("teacher", teacher, {}),
        ("teacher", responder, {}),
        ("learner", rank, {"DS_ACCELERATOR": "cpu"}),
    ],
)
@pytest.mark.parametrize("gpus", [0, 1])
def test_resources_and_environment_of_a_role(role, module, more, gpus):
    resources = {f"--{role}.resources.{name}": value for name, value in (("cpus", 3), ("gpus", gpus), ("threads", 2))}
    config = load_config("tiny", [part for name, value in resources.items() for part in (name, str(value))])
    options = module.as_remote(config)._default_options
    assert (options["num_cpus"], options["num_gpus"]) == (3, gpus)
    assert options["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": "2", **(more if not gpus else {})}
    # what comes in beside a rollout, and files written beside training, have threads of their own
    beside = {"rollout": {"weights": 1, "deals": 1}, "learner": {"files": 1, "keeper": 1, "weights": 1}}
    assert options.get("concurrency_groups") == beside.get(role)
