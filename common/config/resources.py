"""What a role's processes reserve from Ray."""

from __future__ import annotations

import math
import re

from pydantic import Field, model_validator

from common.config.section import Section
from common.config.shown import shown

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(f"(?:[A-Za-z0-9.-]+/)?{_LABEL}")
_LABEL_VALUE = re.compile(f"|!?{_LABEL}|!?in\\({_LABEL}(?:, ?{_LABEL})*\\)")


class Resources(Section):
    """What one process of a role reserves from Ray. Fractions of a GPU or CPU are allowed."""

    cpus: float = Field(1.0, ge=0, le=10**4, description="Ray CPUs per process")
    gpus: float = Field(0.0, ge=0, le=10**3, description="Ray GPUs per process: a share of one, or whole ones")
    threads: int = Field(1, ge=1, le=10**4, description="compute threads per process (OMP_NUM_THREADS)")
    labels: dict[str, str] = Field(
        {}, description="Ray node labels that its node must have, e.g. {opdlm-role: rollout}"
    )

    @model_validator(mode="after")
    def _can_be_reserved(self) -> Resources:
        if self.cpus == self.gpus == 0:
            raise ValueError("cpus and gpus are both 0, so that nothing is reserved; set cpus to 0.01 or more")
        for name, amount in (("cpus", self.cpus), ("gpus", self.gpus)):
            if 0 < amount < 1e-4:
                raise ValueError(f"{name} ({amount:g}) is less than Ray can count; use 0, or 0.0001 or more")
        if self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"gpus ({self.gpus:g}) is more than one and not whole; use {math.ceil(self.gpus)}")
        for key, value in self.labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"labels: {shown(key)}: {shown(value)} is no label of Ray; keys and values are up to 63 letters, "
                    "digits, '-', '_' and '.', a key may begin with DOMAIN/, a value may be !VALUE or in(A, B)"
                )
        return self
