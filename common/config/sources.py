"""Where trajectories come from, as configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config.section import Section
from common.config.states import RandomState


class StudentSource(Section):
    """The student's own reverse unmasking, with the weights of the moment: on-policy."""

    kind: Literal["student"] = "student"


class OfflineSource(Section):
    """Responses of `data.responses`, such as the teacher's: off-policy. They have no rounds, so states are random."""

    kind: Literal["offline"] = "offline"


class ReplaySource(Section):
    """Rollouts of an earlier run, with their rounds: what `pipeline.spool` wrote, in `data.trajectories`."""

    kind: Literal["replay"] = "replay"


class ContinuedSource(Section):
    """The student goes on with the beginning of an offline response, which is context and not trained (TrOPD)."""

    kind: Literal["continued"] = "continued"
    max_share: float = Field(
        1.0, gt=0, le=1, description="the beginning is a uniformly drawn share of the response, up to this one"
    )


class MixtureSource(Section):
    """Each prompt takes its offline response with a probability that goes from `start` to `end`, else a rollout."""

    kind: Literal["mixture"] = "mixture"
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="how the offline share goes from start to end; constant: start throughout"
    )
    start: float = Field(1.0, ge=0, le=1, description="offline share of the first rollout batch")
    end: float = Field(0.0, ge=0, le=1, description="offline share from rollout batch `batches` on")
    batches: int = Field(100, ge=1, description="rollout batches until the share is `end`")
    offline_state: RandomState = Field(
        RandomState(),
        description="states of the offline responses; objective.state is that of the rollouts, and suffix that of both",
    )


Source = Annotated[
    StudentSource | OfflineSource | ContinuedSource | ReplaySource | MixtureSource, Field(discriminator="kind")
]


NEED_RESPONSES = ("offline", "continued", "mixture")
