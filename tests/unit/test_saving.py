"""Saving: checkpoints are finished beside the training, and a disk that takes nothing is a warning."""

import json
import shutil
import time

import pytest

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import preflight
from deploy.checkpoints import Checkpoints, RunState
from deploy.files import LineWriter
from deploy.monitoring import observer
from deploy.monitoring.observer import Note, Observer, Observers
from deploy.placement import disk_bytes, plan
from deploy.saving import Saving
from tests.small_disk import fill, small_disk


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[Note] = []

    def note(self, note: Note) -> None:
        self.notes.append(note)


def saving_on(folder, notes: Notes) -> tuple[Saving, Checkpoints]:
    config = load_config("tiny", ["--output_dir", str(folder), "--pipeline.stage_timeout_s", "10"])
    checkpoints = Checkpoints(config)
    return Saving(config.pipeline, checkpoints, Observers([notes]), batches=0), checkpoints


@pytest.fixture
def calls(monkeypatch):
    """The ranks' answers stand for themselves."""

    def get(answers, timeout):
        assert timeout == 10.0
        for answer in answers:
            answer()

    monkeypatch.setattr("deploy.saving.ray.get", get)


def test_a_checkpoint_holds_the_counters_of_when_it_was_begun(tmp_path, calls):
    notes = Notes()
    saving, checkpoints = saving_on(tmp_path, notes)
    with saving._observers:
        state = RunState(batches=5)
        partial = saving.begin("batch-000005", 5) or pytest.fail("no folder")
        (partial / "model.safetensors").write_text("5")
        saving.finish("batch-000005", state, [lambda: time.sleep(0.2)])
        assert saving.busy
        state.batches = 6  # training goes on
        saving.wait()
    assert not saving.busy
    assert (checkpoints.latest() or pytest.fail("none"))[1].batches == 5
    assert [n.level for n in notes.notes] == ["info"] and notes.notes[0].text.startswith("checkpoint batch-000005 is")


def test_a_checkpoint_is_due_by_minutes_and_by_batches(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("deploy.saving.time.monotonic", lambda: now[0])

    def saving(*options: str) -> Saving:
        config = load_config("tiny", ["--output_dir", str(tmp_path), *options])
        return Saving(config.pipeline, Checkpoints(config), Observers(), batches=7)

    by_default = saving()
    assert not by_default.due(8)
    now[0] += 599.0
    assert not by_default.due(9)
    now[0] += 1.0
    assert by_default.due(9) and not by_default.due(7), "ten minutes, and something is trained"
    by_default.begin("batch-000009", 9)
    assert not by_default.due(10)

    by_batches = saving("--pipeline.checkpoint_every_batches", "5", "--pipeline.checkpoint_every_minutes", "0")
    now[0] += 10000.0
    assert [by_batches.due(batches) for batches in (8, 9, 10, 11)] == [False, False, True, True]
    by_batches.begin("batch-000011", 11)  # the one before was still being written
    assert [by_batches.due(batches) for batches in (12, 14, 15)] == [False, False, True]


def test_ranks_that_cannot_write_leave_a_warning_and_the_next_try_succeeds(tmp_path, calls):
    notes = Notes()
    saving, checkpoints = saving_on(tmp_path, notes)

    def broken():
        raise OSError(28, "No space left on device")

    with saving._observers:
        for batches, call in ((5, broken), (10, lambda: None)):
            assert saving.begin(f"batch-{batches:06d}", batches)
            saving.finish(f"batch-{batches:06d}", RunState(batches=batches), [call])
            saving.wait()
    assert [p.name for p in checkpoints.folder.iterdir()] == ["batch-000010"]
    warning, _ = notes.notes
    assert warning.level == "warning" and "batch-000005 could not be written" in warning.text
    assert "No space left on device" in warning.text and "tries again when the next is due" in warning.text


def test_a_full_disk_is_a_warning_and_what_could_not_be_written_is_written_later(tmp_path, calls):
    notes = Notes()
    with small_disk(tmp_path / "disk", 2) as disk:
        saving, checkpoints = saving_on(disk, notes)
        rows = LineWriter(disk / "metrics.jsonl")
        rows.append("0")
        filling = fill(disk)
        with saving._observers:
            partial = saving.begin("batch-000005", 5)
            if partial:  # a folder may still fit
                saving.finish("batch-000005", RunState(batches=5), [lambda: None])
                saving.wait()
            long = json.dumps("x" * 5000)
            for _ in range(3):
                with pytest.raises(OSError, match="No space left"):
                    rows.append(long)
            filling.unlink()
            rows.append("4")
            partial = saving.begin("batch-000010", 10) or pytest.fail("no folder")
            saving.finish("batch-000010", RunState(batches=10), [lambda: None])
            saving.wait()
        assert (disk / "metrics.jsonl").read_text().splitlines() == ["0", long, long, long, "4"]
        assert [p.name for p in checkpoints.folder.iterdir()] == ["batch-000010"]
    assert [n.level for n in notes.notes] == ["warning", "info"]


def test_an_observer_that_cannot_write_does_not_end_the_run(monkeypatch):
    class Full(Observer):
        def heard(self, actor, facts):
            raise OSError(28, "No space left on device", "status.json")

    notes = Notes()
    with Observers([Full(), notes]) as observers:
        for _ in range(3):
            observers.heard("learner-0")
        assert [n.level for n in notes.notes] == ["warning"], "once a minute"
        assert "No space left on device" in notes.notes[0].text
        monkeypatch.setattr(observer, "_QUIET_SECONDS", 0.0)
        observers._quiet_until = 0.0
        observers.heard("learner-0")
    assert len(notes.notes) == 2


def test_a_disk_that_does_not_hold_the_checkpoints_is_refused_before_the_start(tmp_path, monkeypatch):
    def config(*options: str):
        return load_config("tiny", ["--output_dir", str(tmp_path), *options])

    placement = plan(config())
    one = sum(placement.checkpoint.values())
    assert disk_bytes(config(), placement) == 3 * one + placement.checkpoint["model"]
    off = "--pipeline.checkpoint_every_minutes", "0"
    assert disk_bytes(config(*off), placement) == placement.checkpoint["model"]

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * one))
    with pytest.raises(ConfigError, match=r"output_dir: .* GiB free, .* need .*pipeline\.keep_checkpoints \(2\)"):
        preflight.check_disk(config(), placement)
    preflight.check_disk(config(*off), placement)
    preflight.check_disk(config("--pipeline.keep_checkpoints", "1"), placement)
    earlier = tmp_path / "tiny" / "checkpoints" / "batch-000005" / "model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(bytes(placement.checkpoint["model"]))
    preflight.check_disk(config(), placement)  # it goes when newer ones come
