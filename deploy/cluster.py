"""The Ray cluster of a run and its actor pools."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray

from actors import rollout, teacher
from common.config import RunConfig
from deploy.placement import check_resources, plan
from deploy.waiting import wait_all
from learner import rank

# quiet and offline-safe by default; a user's own setting wins
_WORKER_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Pools:
    """Handles of all actors: rollout actors, teachers, learner ranks."""

    rollouts: list[Any]
    teachers: list[Any]
    ranks: list[Any]

    def names(self) -> dict[Any, str]:
        named = {"rollout": self.rollouts, "teacher": self.teachers, "learner": self.ranks}
        return {actor: f"{role}-{i}" for role, actors in named.items() for i, actor in enumerate(actors)}


def connect(config: RunConfig) -> None:
    """Start Ray on this machine, or connect to `ray.address`, and check that the placement fits.

    Raises:
        ConfigError: more CPUs or GPUs are asked for than Ray has.
    """
    environment = {name: os.environ.get(name, value) for name, value in _WORKER_ENVIRONMENT.items()}
    runtime = {"env_vars": environment}
    if config.ray.address:
        ray.init(address=config.ray.address, runtime_env=runtime, log_to_driver=False)
    else:
        # Ray 2.60 turns token mode on by itself once a token file exists; a private local Ray needs none
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            num_cpus=config.ray.num_cpus,
            object_store_memory=config.ray.object_store_mib * 2**20,
            include_dashboard=False,
            runtime_env=runtime,
            log_to_driver=False,
            logging_level="warning",
        )
    available = ray.cluster_resources()
    check_resources(plan(config), available.get("CPU", 0.0), available.get("GPU", 0.0))


def start_pools(config: RunConfig) -> Pools:
    """Create all actors and wait until each has loaded its model.

    Raises:
        StuckError, WorkerError: an actor did not come up in time, or failed; the message names it.
    """
    rollout_class, rank_class = rollout.as_remote(config), rank.as_remote(config)
    teacher_class = teacher.as_remote(config)
    pools = Pools(
        rollouts=[rollout_class.remote(config, i) for i in range(config.rollout.actors)],
        teachers=[teacher_class.remote(config.teacher, config.teacher_path, i) for i in range(config.teacher.actors)],
        ranks=[rank_class.remote(config, i) for i in range(config.learner.ranks)],
    )
    timeout = config.pipeline.start_timeout_s
    names = pools.names()
    (address,) = wait_all({pools.ranks[0].address.remote(): names[pools.ranks[0]]}, "starting the learner", timeout)
    ready = {actor.ready.remote(): names[actor] for actor in pools.rollouts + pools.teachers}
    ready |= {actor.start.remote(*address): names[actor] for actor in pools.ranks}
    wait_all(ready, "loading models", timeout)
    return pools
