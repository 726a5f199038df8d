"""A restarted learner trains batches again with the teacher whose targets they have."""

from pathlib import Path
from types import SimpleNamespace

from common.config.file import load_config
from deploy import learner_group
from deploy.cluster import Pools
from deploy.learner_group import LearnerGroup, TrainedBatch


def test_batches_are_trained_again_under_their_own_anchors(monkeypatch):
    """Three batches before a growth, after it and after the next one; a fourth teaches since."""
    done: list[tuple[str, object]] = []
    monkeypatch.setattr(learner_group, "start_learner", lambda *_: None)
    monkeypatch.setattr(LearnerGroup, "_take_back", lambda _: 3)
    monkeypatch.setattr(LearnerGroup, "_once", lambda _, method, action, *given: done.append((method, given[0])))
    calls = SimpleNamespace(observers=SimpleNamespace(note=lambda text: None))
    group = LearnerGroup(load_config("tiny"), Pools([], [], []), calls, None, lambda cause: None, copies=False)
    anchors = [None, Path("block-4"), Path("block-8")]
    group._recent = [TrainedBatch(3 + i, [f"batch {i}"], i, anchor) for i, anchor in enumerate(anchors)]
    group.version, group._anchor = 6, Path("block-16")
    group._restart()
    assert done == [
        ("limit", {}),
        ("train", ["batch 0"]),
        ("teach_by", Path("block-4")),
        ("train", ["batch 1"]),
        ("teach_by", Path("block-8")),
        ("train", ["batch 2"]),
        ("teach_by", Path("block-16")),
    ]
