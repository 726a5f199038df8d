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
from deploy.serving.options import ServingOptions
from deploy.stop_signals import StopSignals

try:
    from ray import serve
    from ray.serve.config import HTTPOptions
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"--replicas: Ray Serve needs the package {missing.name!r}, which is not installed; pip install 'opdlm[serve]'"
    ) from missing

_NAME = "opdlm"
_HEALTH_SECONDS, _POLL_SECONDS = 10.0, 0.2


class Replica:
    """One server, in a process of its own."""

    def __init__(self, options: ServingOptions, threads: int) -> None:
        torch.set_num_threads(threads)
        # the replicas are renewed together, by a new start: one of them alone would serve other weights
        self.server = replace(load_server(options), folder=None)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.server)

    def check_health(self) -> None:
        if failure := self.server.engine.failure:
            raise RuntimeError(f"the engine has ended: {failure}")


def application(options: ServingOptions, replicas: int, drain_seconds: int, gpus: bool) -> Any:
    """The Ray Serve application of so many servers, each with a GPU or a share of this machine's CPUs."""
    threads = 1 if gpus else max((os.cpu_count() or 1) // replicas, 1)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=_NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(gpus)},
        max_ongoing_requests=slots_of(options) + options.queue,  # the server itself refuses what is too much
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=drain_seconds,
    )
    return deployment.bind(options, threads)


def serve_replicas(
    options: ServingOptions,
    replicas: int,
    port: int,
    drain_seconds: int,
    address: str | None,
    ready: Callable[[], None],
) -> None:
    """Serve until a signal comes; `ready` is called when all replicas answer.

    Raises:
        ConfigError: no cluster answers at `address`.
        RuntimeError: the replicas do not start.
        SystemExit: with 128 and the signal's number, when all is ended.
    """
    gpus = torch.cuda.is_available()
    connect(RayConfig(address=address, num_cpus=None if address or gpus else replicas + 1))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options=HTTPOptions(host=options.host, port=port))
        serve.run(application(options, replicas, drain_seconds, gpus), name=_NAME, route_prefix="/")
        ready()
        with StopSignals() as stop:
            while not stop.requested:
                time.sleep(_POLL_SECONDS)
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.exit(128 + stop.received)
