"""Several servers behind one port: Ray Serve spreads requests over them and replaces one that fails."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
from fastapi import FastAPI

from common.config.cluster import RayConfig
from common.config.errors import ConfigError
from deploy.cluster import connect
from deploy.serving.app import create_app
from deploy.serving.loading import load_server, slots_of
from deploy.serving.options import Replicas, ServingOptions
from deploy.stop_signals import StopSignals

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, HTTPOptions
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"--replicas: Ray Serve needs the package {missing.name!r}, which is not installed; pip install 'opdlm[serve]'"
    ) from missing

NAME = "opdlm"
_TARGET_LOAD = 0.8  # of a replica's slots: where more are in use, another replica is started
_HEALTH_SECONDS, _POLL_SECONDS = 10.0, 0.2


class Replica:
    """One server, in a process of its own, which computes on as many threads as Ray gives it CPUs."""

    def __init__(self, options: ServingOptions) -> None:
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))
        # the replicas are renewed together, by a new start: one of them alone would serve other weights
        self.server = replace(load_server(options), folder=None)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.server)

    def check_health(self) -> None:
        if failure := self.server.engine.failure:
            raise RuntimeError(f"the engine has ended: {failure}")


def application(options: ServingOptions, replicas: Replicas, drain_seconds: int, cpus: int = 1) -> Any:
    """The Ray Serve application of so many servers. Each has a GPU where the cluster has any, else `cpus` CPUs."""
    gpus = cluster_has_gpus()
    slots = slots_of(options, gpus)
    count: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.least < replicas.most:
        scaling = AutoscalingConfig(
            min_replicas=replicas.least, max_replicas=replicas.most, target_ongoing_requests=_TARGET_LOAD * slots
        )
        count = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        **count,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1} if gpus else {"num_cpus": cpus},
        max_ongoing_requests=slots + options.queue,  # the server itself refuses what is too much
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=drain_seconds,
    )
    return deployment.bind(options)


def cluster_has_gpus() -> bool:
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def serve_replicas(
    options: ServingOptions,
    replicas: Replicas,
    port: int,
    drain_seconds: int,
    address: str | None,
    ready: Callable[[], None],
) -> None:
    """Serve until a signal comes; `ready` is called when all replicas answer. On this machine alone they share its
    CPUs.

    Raises:
        ConfigError: no cluster answers at `address`.
        RuntimeError: the replicas do not start.
        SystemExit: with 128 and the signal's number, when all is ended.
    """
    cores = os.cpu_count() or 1
    connect(RayConfig(address=address, num_cpus=None if address else max(cores, replicas.most)))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options=HTTPOptions(host=options.host, port=port))
        cpus = 1 if address else max(cores // replicas.most, 1)
        serve.run(application(options, replicas, drain_seconds, cpus), name=NAME, route_prefix="/")
        ready()
        with StopSignals() as stop:
            while not stop.requested:
                time.sleep(_POLL_SECONDS)
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.exit(128 + stop.received)
