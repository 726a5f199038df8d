"""The section of the Ray cluster."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from common.config.section import Section
from common.config.shown import shown
from common.config.values import LONGEST_WAIT_S

_CLUSTER = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def _is_cluster(address: str) -> str:
    match = _CLUSTER.fullmatch(address)
    if address != "auto" and (not match or not 0 < int(match[1]) < 2**16):
        raise ValueError(
            f"{shown(address)} is no address of a Ray cluster; use auto on one of its machines, or HOST:PORT as "
            "`ray start --head` prints it"
        )
    return address


class RayConfig(Section):
    """Where the actors run."""

    address: Annotated[str, AfterValidator(_is_cluster)] | None = Field(
        None, description="an existing cluster ('auto' or host:port); default: start one here"
    )
    num_cpus: int | None = Field(
        None, ge=1, le=10**5, description="CPUs of the Ray started here; default: this machine's"
    )
    placement_timeout_s: float = Field(
        300.0,
        gt=0,
        le=LONGEST_WAIT_S,
        description="deadline for a cluster to provide what the placement asks for, e.g. by autoscaling",
    )
    object_store_mib: int | None = Field(
        None,
        ge=80,
        le=2**24,
        description="object store of the Ray started here; default: what the run needs, 512 at least",
    )
