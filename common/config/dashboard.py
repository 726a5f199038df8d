"""Configuration of the dashboard: the page of a run that the job itself serves."""

from __future__ import annotations

import ipaddress

from pydantic import Field, model_validator

from common.config.paths import InputPath
from common.config.section import Section


class DashboardConfig(Section):
    """The run's page. Its files are always written; `opdlm dashboard RUN` shows them where the job does not."""

    enabled: bool = Field(False, description="serve the page from the job, in a process of its own")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        max_length=255,
        description="address to bind; any but this machine's loopback needs token_file",
    )
    port: int = Field(8270, ge=0, le=65535, description="port to bind; 0: any free one")
    token_file: InputPath | None = Field(
        None, description="text file with the token that a visitor must give, 16 characters or more"
    )
    rollouts: int = Field(2, ge=0, le=16, description="rollouts of each batch kept for the trajectory viewer")

    @model_validator(mode="after")
    def _guarded(self) -> DashboardConfig:
        if not is_loopback(self.host) and self.token_file is None:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, so a token is required: set token_file, "
                "or bind 127.0.0.1 and forward the port (ssh -L, kubectl port-forward)"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address: `localhost`, 127.0.0.0/8 or ::1; other names count as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
