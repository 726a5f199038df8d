"""Types and bounds of values that several sections share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

MOST_PROCESSES = 4096  # of one role
MOST_TOKENS = 10**7  # of a prompt or a response
LONGEST_WAIT_S = 10**7

Dtype = Literal["float32", "bfloat16"]


def far_from_zero(value: float) -> float:
    if 0 < value < 1e-3:
        raise ValueError(f"{value:g} is too close to 0 to divide by; use 0, which takes the best token, or 0.001")
    return value


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(far_from_zero)]
