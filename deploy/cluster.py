"""The Ray cluster of a run and its actor pools."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication import authentication_token_setup
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import rollout
from actors.teacher import actor as teacher
from common.compiled_code import compiled_code_environment
from common.config.cluster import RayConfig
from common.config.errors import ConfigError
from common.config.run import RunConfig
from common.conversion import counted_tokens, student_of
from common.ray_actor import ADDRESS
from deploy.placement import LEAST_STORE_MIB, Placement, check_resources, ray_exists
from deploy.remote_calls import RemoteCalls
from deploy.roles import COUNT_FIELDS, ROLES, Role, role_of
from learner import rank

# quiet and offline-safe by default; a user's own setting wins
_WORKER_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


Groups = dict[Role, PlacementGroup]
_POLL_SECONDS = 0.2

_ANSWER_SECONDS = 20.0


@dataclass
class Pools:
    """Handles of all actors: rollout actors, teachers, learner ranks; and the placement groups that hold them. The
    teachers of the first pool come first; `teacher_pools` has the number of each one's. New teachers load the student
    in the folder `anchor`, where that is set."""

    rollouts: list[Any]
    teachers: list[Any]
    ranks: list[Any]
    groups: Groups = field(default_factory=dict)
    create: Callable[[Role, int], Any] | None = None
    teacher_pools: tuple[int, ...] = ()
    anchor: Path | None = None

    def teachers_of(self, pool: int) -> list[Any]:
        return [teacher for teacher, of in zip(self.teachers, self.teacher_pools, strict=True) if of == pool]

    def stop(self) -> None:
        """End all actors and give their resources back."""
        for actor in self.names():
            ray.kill(actor)
        for group in self.groups.values():
            remove_placement_group(group)

    def names(self) -> dict[Any, str]:
        return {actor: f"{role}-{i}" for role in ROLES for i, actor in enumerate(self._of(role))}

    def actor(self, name: str) -> Any:
        return self._of(role_of(name))[int(name.rpartition("-")[2])]

    def replace(self, name: str) -> Any:
        """Kill the actor of that name; a new one takes its place as soon as its resources are free."""
        assert self.create
        role, index = role_of(name), int(name.rpartition("-")[2])
        ray.kill(self._of(role)[index])
        self._of(role)[index] = self.create(role, index)
        return self._of(role)[index]

    def _of(self, role: Role) -> list[Any]:
        named: dict[Role, list[Any]] = {"rollout": self.rollouts, "teacher": self.teachers, "learner": self.ranks}
        return named[role]


def actor_id(actor: Any) -> str:
    return str(actor._actor_id.hex())


def asked(ref: ray.ObjectRef) -> str:
    """The id of the actor that a call was made to."""
    return str(ref.task_id().actor_id().hex())


def connect(settings: RayConfig, object_store_mib: int | None = None, cache_dir: Path | None = None) -> None:
    """Connect to `address`, or to the cluster whose job this process is; else start Ray on this machine, with an
    object store of so many MiB. All actors keep their compiled code in `cache_dir` (common/compiled_code.py).

    Raises:
        ConfigError: no cluster answers there.
    """
    environment = {name: os.environ.get(name, value) for name, value in _WORKER_ENVIRONMENT.items()}
    environment |= compiled_code_environment(cache_dir)
    runtime = {"env_vars": environment}
    if ray_exists(settings):
        address = settings.address or os.environ["RAY_ADDRESS"]
        try:
            host, _, port = address.rpartition(":")
            if port.isdecimal():  # Ray itself would try for a minute
                socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
            ray.init(address=settings.address, runtime_env=runtime, log_to_driver=False, logging_level="warning")
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"ray.address: no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}); is "
                "`ray start --head` running there?"
            ) from error
        return
    # Ray listens on every address of the machine: it asks for a token that only the processes of this run know. Ray
    # itself turns tokens on when no mode is set; a mode set here would reach its head alone
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)  # it advises to turn them off
    environment[ADDRESS] = "127.0.0.1"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _deaf_children():
        ray.init(
            address="local",  # never a head that happens to run on this machine
            num_cpus=settings.num_cpus,
            object_store_memory=(settings.object_store_mib or object_store_mib or LEAST_STORE_MIB) * 2**20,
            include_dashboard=False,
            runtime_env=runtime,
            log_to_driver=False,
            logging_level="warning",
        )


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, never get SIGTERM: `timeout`, Slurm and shells send it to the
    whole process group, and a driver without its actors could not write its last checkpoint. They end with the driver.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited, and kept by exec
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reserve(config: RunConfig, placement: Placement, calls: RemoteCalls, roles: Sequence[Role]) -> Groups:
    """One placement group per role: learner ranks packed, rollout actors and teachers spread.

    Raises:
        ConfigError: the cluster did not provide them within `ray.placement_timeout_s`; says what is missing.
        StopRequested: the run was asked to stop.
    """
    groups: Groups = {}
    for role in reversed(roles):  # the learner first: its ranks are packed
        processes = [p for p in placement.processes if p.role == role]
        if not processes:  # hard labels need no teacher
            continue
        bundles = [{"CPU": p.cpus, **({"GPU": p.gpus} if p.gpus else {})} for p in processes]
        labels = [p.labels for p in processes]
        groups[role] = placement_group(
            bundles,
            strategy="PACK" if role == "learner" else "SPREAD",
            bundle_label_selector=labels if any(labels) else None,
        )
    deadline = time.monotonic() + config.ray.placement_timeout_s
    for role, group in groups.items():
        while not group.wait(timeout_seconds=_POLL_SECONDS):
            calls.stop.check()
            if time.monotonic() > deadline:
                raise _not_provided(config, placement, role, group)
    return groups


def _not_provided(config: RunConfig, placement: Placement, role: Role, group: PlacementGroup) -> ConfigError:
    total, free = ray.cluster_resources(), ray.available_resources()
    check_resources(placement, total.get("CPU", 0.0), total.get("GPU", 0.0))
    asked = ", ".join(f"{n} x {b}" for b, n in _counted(group.bundle_specs))
    asked += _labelled(next(p.labels for p in placement.processes if p.role == role))
    return ConfigError(
        f"the cluster did not provide the {role} processes ({asked}) within ray.placement_timeout_s "
        f"({config.ray.placement_timeout_s:g} s); free are {free.get('CPU', 0):g} CPUs and "
        f"{free.get('GPU', 0):g} GPUs: stop other jobs, lower {COUNT_FIELDS[role]}, or wait longer"
    )


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


def create_pools(
    config: RunConfig,
    placement: Placement,
    calls: RemoteCalls,
    roles: Sequence[Role] = ROLES,
) -> Pools:
    """Create all actors of some roles in their placement groups; they begin to load their models.

    Raises:
        ConfigError: the cluster has no room for them.
        StopRequested: the run was asked to stop.
    """
    groups = reserve(config, placement, calls, roles)
    shape = config.objective.teacher_shape
    student = student_of(config)
    classes: dict[Role, Any] = {"rollout": rollout, "teacher": teacher, "learner": rank}
    pool_of = tuple(p.pool for p in placement.processes if p.role == "teacher")

    def create(role: Role, index: int) -> Any:
        place = PlacementGroupSchedulingStrategy(groups[role], placement_group_bundle_index=index)
        if role != "teacher":
            return classes[role].as_remote(config).options(scheduling_strategy=place).remote(config, index)
        own = (config.anchored(pools.anchor) if pools.anchor else config).by_teacher[pool_of[index]]
        actor_class = teacher.as_remote(own).options(scheduling_strategy=place)
        tokens = counted_tokens(student, own.teacher_path)
        return actor_class.remote(own.teacher, own.teacher_path, index, shape=shape, tokens=tokens)

    def of_role(role: Role) -> list[Any]:
        return [create(role, i) for i in range(groups[role].bundle_count if role in groups else 0)]

    pools = Pools([], [], [], groups, create, pool_of)
    pools.rollouts, pools.teachers, pools.ranks = of_role("rollout"), of_role("teacher"), of_role("learner")
    calls.repair.watch(pools)
    return pools


def load_models(config: RunConfig, pools: Pools, calls: RemoteCalls) -> None:
    """Wait until every rollout actor and teacher has loaded its model.

    Raises:
        StuckError, WorkerError: an actor did not come up in time, or failed; the message names it.
        StopRequested: the run was asked to stop.
    """
    names = pools.names()
    _heard(config, calls, {actor.ready.remote(): names[actor] for actor in pools.rollouts + pools.teachers}, pools)
    if len(config.teacher_paths) > 1:
        served = [teacher.prompts_served for teacher in config.teacher.pools.values()]
        for actor, pool in zip(pools.teachers, pools.teacher_pools, strict=True):
            calls.observers.heard(names[actor], serves=served[pool])


def start_learner(config: RunConfig, pools: Pools, calls: RemoteCalls) -> None:
    """Have the ranks of the learner load the model together; raises as `load_models`."""
    names, timeout = pools.names(), config.pipeline.start_timeout_s
    addresses = {pools.ranks[0].address.remote(): names[pools.ranks[0]]}
    (address,) = calls.wait(addresses, "starting the learner", timeout_s=timeout, until_stop=True)
    _heard(config, calls, {actor.start.remote(*address): names[actor] for actor in pools.ranks})


def _heard(
    config: RunConfig, calls: RemoteCalls, starts: dict[ray.ObjectRef, str], replaceable: Pools | None = None
) -> None:
    """Wait for what actors say of themselves when they have loaded; those of `replaceable` may be others by then."""
    again = (lambda name: replaceable.actor(name).ready.remote()) if replaceable else None
    timeout = config.pipeline.start_timeout_s
    ready = calls.wait(starts, "loading models", timeout_s=timeout, until_stop=True, again=again)
    for name, facts in zip(starts.values(), ready, strict=True):
        calls.observers.heard(name, facts)


def form_weights_group(pools: Pools, calls: RemoteCalls, timeout_s: float) -> None:
    """Connect learner rank 0 and all rollout actors for the broadcast of weights.

    Raises:
        StuckError, WorkerError: a member did not come in time, or failed; the message names it.
        StopRequested: the run was asked to stop.
    """
    names, sender = pools.names(), pools.ranks[0]
    members = tuple(names[actor] for actor in (sender, *pools.rollouts))
    action = "forming the weights group"
    opened = {sender.open_weights_group.remote(): members[0]}
    (address,) = calls.wait(opened, action, timeout_s=timeout_s, until_stop=True)
    joins = {sender.join_weights_group.remote(members): members[0]}
    for place, actor in enumerate(pools.rollouts, start=1):
        joins[actor.join_weights_group.remote(address, members, place)] = members[place]
    calls.wait(joins, action, timeout_s=timeout_s, until_stop=True)
