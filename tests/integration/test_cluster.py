"""Placement groups on a real Ray: granted, or refused within the deadline with what is missing."""

import time

import pytest
import ray

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import cluster
from deploy.placement import plan
from deploy.remote_calls import RemoteCalls
from deploy.roles import ROLES

pytestmark = pytest.mark.integration


def config(*overrides: str):
    return load_config("tiny", ["--ray.placement_timeout_s", "1.5", *overrides])


def reserve(settings):
    return cluster.reserve(settings, plan(settings), RemoteCalls(1.0), ROLES)


@pytest.mark.usefixtures("ray_local")
def test_groups_are_granted_or_refused_in_time():
    groups = reserve(config())
    assert {role: group.bundle_count for role, group in groups.items()} == {"rollout": 2, "teacher": 1, "learner": 2}
    for group in groups.values():
        ray.util.remove_placement_group(group)

    # a run that is refused ends and gives back what it had been granted; here that stays, and the cluster fills up
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"asks for 2 GPUs .*but Ray has 0"):
        reserve(config("--learner.resources.gpus", "1"))
    with pytest.raises(ConfigError, match=r"on nodes labelled opdlm-role=learner, which 0 of 1 nodes are"):
        reserve(config("--learner.resources.labels.opdlm-role", "learner"))
    with pytest.raises(ConfigError) as error:
        reserve(config())
    assert "did not provide the learner processes (2 x 0.5 CPU) within ray.placement_timeout_s" in str(error.value)
    assert "free are 0." in str(error.value)
    assert time.monotonic() - start < 60
