"""The Ray cluster of a run and its actor pools."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import rollout
from actors.teacher import actor as teacher
from common.config.errors import ConfigError
from common.config.run import RunConfig
from deploy.placement import LEAST_STORE_MIB, check_resources, on_cluster, plan
from deploy.remote_calls import wait_all
from learner import rank

_FIELDS = {"rollout": "rollout.actors", "teacher": "teacher.actors", "learner": "learner.ranks"}

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
    """Handles of all actors: rollout actors, teachers, learner ranks; and what each said when it was ready."""

    rollouts: list[Any]
    teachers: list[Any]
    ranks: list[Any]
    ready: dict[str, dict[str, Any]] = field(default_factory=dict)

    def names(self) -> dict[Any, str]:
        named = {"rollout": self.rollouts, "teacher": self.teachers, "learner": self.ranks}
        return {actor: f"{role}-{i}" for role, actors in named.items() for i, actor in enumerate(actors)}


def connect(config: RunConfig, needed_mib: int = LEAST_STORE_MIB) -> None:
    """Connect to `ray.address`, or to the cluster whose job this process is; else start Ray on this machine, with an
    object store of `ray.object_store_mib`, or as large as needed."""
    environment = {name: os.environ.get(name, value) for name, value in _WORKER_ENVIRONMENT.items()}
    runtime = {"env_vars": environment}
    if on_cluster(config):
        ray.init(address=config.ray.address, runtime_env=runtime, log_to_driver=False, logging_level="warning")
        return
    # Ray 2.60 turns token mode on by itself once a token file exists; a private local Ray needs none
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",  # never a head that happens to run on this machine
        num_cpus=config.ray.num_cpus,
        object_store_memory=(config.ray.object_store_mib or needed_mib) * 2**20,
        include_dashboard=False,
        runtime_env=runtime,
        log_to_driver=False,
        logging_level="warning",
    )


def reserve(config: RunConfig) -> dict[str, PlacementGroup]:
    """One placement group per role: learner ranks packed, rollout actors and teachers spread.

    Raises:
        ConfigError: the cluster did not provide them within `ray.placement_timeout_s`; says what is missing.
    """
    placement = plan(config)
    groups = {}
    for role in ("learner", "teacher", "rollout"):
        processes = [p for p in placement.processes if p.role == role]
        if not processes:  # hard labels need no teacher
            continue
        bundles = [{"CPU": p.cpus, **({"GPU": p.gpus} if p.gpus else {})} for p in processes]
        labels = getattr(config, role).resources.labels
        groups[role] = placement_group(
            bundles,
            strategy="PACK" if role == "learner" else "SPREAD",
            bundle_label_selector=[labels] * len(bundles) if labels else None,
        )
    deadline = time.monotonic() + config.ray.placement_timeout_s
    for role, group in groups.items():
        if not group.wait(timeout_seconds=max(deadline - time.monotonic(), 0.1)):
            total, free = ray.cluster_resources(), ray.available_resources()
            check_resources(placement, total.get("CPU", 0.0), total.get("GPU", 0.0))
            asked = ", ".join(f"{n} x {b}" for b, n in _counted(group.bundle_specs))
            asked += _labelled(getattr(config, role).resources.labels)
            raise ConfigError(
                f"the cluster did not provide the {role} processes ({asked}) within ray.placement_timeout_s "
                f"({config.ray.placement_timeout_s:g} s); free are {free.get('CPU', 0):g} CPUs and "
                f"{free.get('GPU', 0):g} GPUs: stop other jobs, lower {_FIELDS[role]}, or wait longer"
            )
    return groups


def _labelled(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    alive = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    having = sum(labels.items() <= of_node.items() for of_node in alive)
    wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
    return f", on nodes labelled {wanted}, which {having} of {len(alive)} nodes are"


def _counted(bundles: list[dict[str, float]]) -> list[tuple[str, int]]:
    names = Counter(" + ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles)
    return list(names.items())


def start_pools(config: RunConfig) -> Pools:
    """Create all actors in their placement groups and wait until each has loaded its model.

    Raises:
        ConfigError: the cluster has no room for them.
        StuckError, WorkerError: an actor did not come up in time, or failed; the message names it.
    """
    groups = reserve(config)

    def create(role: str, actor_class: Any, *arguments: Any, **options: Any) -> list[Any]:
        count = groups[role].bundle_count if role in groups else 0
        return [
            actor_class.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(groups[role], placement_group_bundle_index=i)
            ).remote(*arguments, i, **options)
            for i in range(count)
        ]

    shape = config.objective.shape
    pools = Pools(
        rollouts=create("rollout", rollout.as_remote(config), config),
        teachers=create("teacher", teacher.as_remote(config), config.teacher, config.teacher_path, shape=shape),
        ranks=create("learner", rank.as_remote(config), config),
    )
    timeout = config.pipeline.start_timeout_s
    names = pools.names()
    (address,) = wait_all({pools.ranks[0].address.remote(): names[pools.ranks[0]]}, "starting the learner", timeout)
    ready = {actor.ready.remote(): names[actor] for actor in pools.rollouts + pools.teachers}
    ready |= {actor.start.remote(*address): names[actor] for actor in pools.ranks}
    pools.ready = dict(zip(ready.values(), wait_all(ready, "loading models", timeout), strict=True))
    if config.weights_transport == "broadcast":
        form_weights_group(pools, timeout)
    return pools


def form_weights_group(pools: Pools, timeout_s: float) -> None:
    """Connect learner rank 0 and all rollout actors for the broadcast of weights.

    Raises:
        StuckError, WorkerError: a member did not come in time, or failed; the message names it.
    """
    names, sender = pools.names(), pools.ranks[0]
    members = tuple(names[actor] for actor in (sender, *pools.rollouts))
    action = "forming the weights group"
    (address,) = wait_all({sender.open_weights_group.remote(): members[0]}, action, timeout_s)
    joins = {sender.join_weights_group.remote(members): members[0]}
    for place, actor in enumerate(pools.rollouts, start=1):
        joins[actor.join_weights_group.remote(address, members, place)] = members[place]
    wait_all(joins, action, timeout_s)
