"""The roles that processes of a run have, in the order in which data passes through them."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["rollout", "teacher", "learner"]

ROLES: tuple[Role, ...] = get_args(Role)
STAGES = (*ROLES, "publish")  # what takes a part of a rollout batch's time

# the config field with the number of a role's processes
COUNT_FIELDS: dict[Role, str] = {"rollout": "rollout.actors", "teacher": "teacher.actors", "learner": "learner.ranks"}


def role_of(name: str) -> Role:
    """Of an actor's name, such as rollout-0."""
    role: Role = name.rpartition("-")[0]  # type: ignore[assignment]
    return role
