"""A class as a Ray actor with the resources of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from common.config.run import Resources


def as_ray_actor(
    actor_class: type, resources: Resources, environment: Mapping[str, str] | None = None, **options: Any
) -> Any:
    """The Ray actor class; `environment` adds variables to its processes, `options` are those of `ray.remote`.

    OMP_NUM_THREADS is set before the process loads any library: OpenMP reads it once.
    """
    variables = {"OMP_NUM_THREADS": str(resources.threads), **(environment or {})}
    return ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, runtime_env={"env_vars": variables}, **options)(
        actor_class
    )
