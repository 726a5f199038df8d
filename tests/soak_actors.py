"""The actors of a run with orders from the soak test: to fail once, or to be slow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from actors.rollout import RolloutActor
from actors.teacher.actor import TeacherActor
from learner.rank import LearnerRank
from tests.soak import ORDERS, SLOW_SECONDS


def obey(name: str) -> None:
    orders = Path(os.environ[ORDERS])
    if (orders / f"{name}.slow").exists():
        time.sleep(SLOW_SECONDS)
    fail = orders / f"{name}.raise"
    if fail.exists():
        fail.unlink()
        raise ValueError("ordered to fail")


class Rollout(RolloutActor):
    def _finished(self, trajectories: Any) -> Any:
        obey(f"rollout-{self.index}")
        return super()._finished(trajectories)


class Teacher(TeacherActor):
    def _annotate(self, works: Any) -> None:
        obey(f"teacher-{self.index}")
        super()._annotate(works)


class Rank(LearnerRank):
    def _accumulate(self, update: Any, sums: Any) -> None:
        obey(f"learner-{self.rank}")
        super()._accumulate(update, sums)
