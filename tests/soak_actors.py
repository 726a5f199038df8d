"""The actors of a run with orders from the soak test: to fail once in a phase, or to be slow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from actors.rollout import RolloutActor
from actors.teacher.actor import TeacherActor
from learner.rank import LearnerRank
from learner.updater import Updater
from tests.soak_plan import ORDERS, SLOW_SECONDS


def obey(name: str, phase: str) -> None:
    orders = Path(os.environ[ORDERS])
    if (orders / f"{name}.slow").exists():
        time.sleep(SLOW_SECONDS)
    fail = orders / f"{name}.raise"
    if fail.exists() and fail.read_text() == phase:
        fail.unlink()
        raise ValueError("ordered to fail")


class Rollout(RolloutActor):
    def __init__(self, config: Any, index: int) -> None:
        obey(f"rollout-{index}", "loading")
        super().__init__(config, index)

    def _finished(self, trajectories: Any) -> Any:
        obey(f"rollout-{self.index}", "rollout")
        return super()._finished(trajectories)

    def swap_weights(self, version: int) -> int:
        obey(f"rollout-{self.index}", "weights")
        return super().swap_weights(version)

    def evaluate(self, *arguments: Any) -> Any:
        obey(f"rollout-{self.index}", "evaluating")
        return super().evaluate(*arguments)


class Teacher(TeacherActor):
    def __init__(self, config: Any, model_path: str, index: int = 0, **named: Any) -> None:
        obey(f"teacher-{index}", "loading")
        super().__init__(config, model_path, index, **named)

    def _annotate(self, works: Any) -> None:
        obey(f"teacher-{self.index}", "teacher")
        super()._annotate(works)


class RankUpdater(Updater):
    def accumulated(self, *arguments: Any, **named: Any) -> Any:
        obey(f"learner-{self.rank}", "training")
        return super().accumulated(*arguments, **named)


class Rank(LearnerRank):
    def __init__(self, config: Any, rank: int) -> None:
        super().__init__(config, rank)
        self.updater = RankUpdater(config, rank)

    def start(self, host: str, port: int) -> dict[str, Any]:
        obey(f"learner-{self.rank}", "loading")
        return super().start(host, port)

    def publish(self, version: int) -> Any:
        obey(f"learner-{self.rank}", "publishing")
        return super().publish(version)

    def save(self, *arguments: Any) -> None:
        obey(f"learner-{self.rank}", "saving")
        super().save(*arguments)
