"""A class as a Ray actor with the resources of the config, which sends heartbeats."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray

from common.config.resources import Resources
from common.heartbeat import Heartbeat

ADDRESS = "OPDLM_ADDRESS"  # set where all processes of a run are on one machine


def own_address() -> str:
    """Where other processes of the run reach this one: on loopback where all are on this machine, else at the node's
    address."""
    return os.environ.get(ADDRESS) or str(ray.util.get_node_ip_address())


def as_ray_actor(
    actor_class: type, resources: Resources, environment: Mapping[str, str] | None = None, **options: Any
) -> Any:
    """The Ray actor class; `environment` adds variables to its processes, `options` are those of `ray.remote`.

    Its processes send heartbeats from their first moment, with the value of its method `progress` where it has one.
    OMP_NUM_THREADS is set before the process loads any library: OpenMP reads it once.
    """
    variables = {"OMP_NUM_THREADS": str(resources.threads), **(environment or {})}
    return ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, runtime_env={"env_vars": variables}, **options)(
        _with_heartbeat(actor_class)
    )


def _with_heartbeat(actor_class: type) -> type:
    class Beating(actor_class):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            heartbeat = Heartbeat()
            heartbeat.start()
            super().__init__(*arguments, **named)
            heartbeat.loaded(getattr(self, "progress", lambda: 0))

    Beating.__name__ = Beating.__qualname__ = actor_class.__name__  # the process's title
    return Beating
