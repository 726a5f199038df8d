"""Checkpoints: the manifest comes last, older ones go, finished ones are copied, and what is incomplete is not used."""

import hashlib
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from pyarrow import fs

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import preflight
from deploy.checkpoints import Checkpoints, FeedbackFields, Manifest, RunState, check_same_run, copy_folder
from deploy.curriculum import Feedback
from deploy.monitoring.observer import Note, Observer, Observers
from deploy.pipeline import write_resolved_config


class Notes(Observer):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def note(self, note: Note) -> None:
        assert note.level == "warning"
        self.warnings.append(note.text)


def checkpoints_of(
    folder: Path, keep: int, copy_to: str | None = None, *overrides: str, data: dict[str, str] | None = None
) -> Checkpoints:
    options = ["--output_dir", str(folder), "--pipeline.keep_checkpoints", str(keep), *overrides]
    options += ["--pipeline.copy_checkpoints_to", copy_to] if copy_to else []
    return Checkpoints(load_config("tiny", options), data)


def save(checkpoints: Checkpoints, state: RunState, name: str = "", notes: Notes | None = None) -> str:
    name = name or f"batch-{state.batches:06d}"
    partial = checkpoints.begin(name)
    (partial / "resume").mkdir()
    (partial / "resume" / "shard").write_text("states")
    (partial / "model.safetensors").write_text(str(state.batches))
    folder, _ = checkpoints.finish(name, state)
    with Observers([notes or Notes()]) as observers:
        checkpoints.copy_missing(observers)
    checkpoints.prune()
    return folder.name


def test_the_newest_are_kept_and_resumed_from(tmp_path):
    checkpoints = checkpoints_of(tmp_path, 2)
    assert checkpoints.latest() is None
    feedback = Feedback(stopped=True, growths=1, divergences=[0.3, 0.2], acceptances=[0.5, 0.4])
    states = [
        RunState(batches=b, updates=8 * b, block_size=4, feedback=replace(feedback, gates=b)) for b in (5, 10, 15)
    ]
    assert [save(checkpoints, s) for s in states] == ["batch-000005", "batch-000010", "batch-000015"]
    assert [p.name for p in checkpoints.complete()] == ["batch-000010", "batch-000015"]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["batch-000010", "batch-000015"]
    folder, state = checkpoints.latest() or pytest.fail("none")
    assert (folder.name, state) == ("batch-000015", states[-1])


def test_a_checkpoint_without_manifest_is_not_there(tmp_path):
    checkpoints = checkpoints_of(tmp_path, 2)
    save(checkpoints, RunState(batches=5))
    (checkpoints.begin("batch-000010") / "model.safetensors").write_text("half")  # killed while it saved
    (checkpoints.folder / "batch-000015").mkdir()
    folder, _ = checkpoints.latest() or pytest.fail("none")
    assert folder.name == "batch-000005"
    assert list(checkpoints.begin("batch-000010").iterdir()) == []  # the next try begins anew


@pytest.mark.parametrize("scheme", ["", "file://", "fsspec+memory://"])
def test_finished_checkpoints_are_copied_and_stay_when_pruned(tmp_path, scheme):
    place = f"/bucket-{tmp_path.name}" if "memory" in scheme else f"{tmp_path}/copies"
    checkpoints = checkpoints_of(tmp_path / "run", 1, f"{scheme}{place}/")
    for batches in (5, 10):
        save(checkpoints, RunState(batches=batches))
    system, root = fs.FileSystem.from_uri(f"{scheme}{place}") if scheme else (fs.LocalFileSystem(), place)
    for batches in (5, 10):
        with system.open_input_stream(f"{root}/batch-{batches:06d}/manifest.json") as file:
            assert json.loads(file.read())["batches"] == batches
        assert system.get_file_info(f"{root}/batch-{batches:06d}/model.safetensors").is_file
    assert [p.name for p in checkpoints.complete()] == ["batch-000010"]


@pytest.mark.parametrize("url", ["s3x://bucket", "fsspec+nothing://bucket", "file:///a b"])
def test_a_place_that_cannot_be_opened_is_refused_before_anything_starts(tmp_path, url):
    overrides = ["--output_dir", str(tmp_path), "--teacher.backend", "transformers"]
    with pytest.raises(ConfigError, match=r"pipeline\.copy_checkpoints_to: '.*fsspec\+PROTOCOL"):
        preflight.prepare(load_config("tiny", [*overrides, "--pipeline.copy_checkpoints_to", url]))


def test_a_copy_that_fails_is_a_warning_and_tried_again(tmp_path):
    target = tmp_path / "target"
    target.write_text("a file where the folder should be")
    checkpoints, notes = checkpoints_of(tmp_path / "run", 2, str(target)), Notes()
    save(checkpoints, RunState(batches=5), notes=notes)
    (warning,) = notes.warnings
    assert warning.startswith(f"copying checkpoint batch-000005 to {target}/batch-000005 failed (")
    assert "it is tried again after the next one" in warning
    target.unlink()  # mended
    save(checkpoints, RunState(batches=10), notes=notes)
    assert len(notes.warnings) == 1
    assert sorted(p.name for p in target.iterdir()) == ["batch-000005", "batch-000010"]
    assert (target / "batch-000005" / "resume" / "shard").read_text() == "states"


def test_a_checkpoint_that_was_never_copied_is_named_when_it_is_pruned(tmp_path):
    target = tmp_path / "target"
    target.write_text("in the way")
    checkpoints, notes = checkpoints_of(tmp_path / "run", 1, str(target)), Notes()
    for batches in (5, 10, 15):
        save(checkpoints, RunState(batches=batches), notes=notes)
    assert f"checkpoint batch-000005 was never copied to {target}/batch-000005 and is pruned here" in notes.warnings


def test_the_manifest_of_a_copy_comes_last(tmp_path, monkeypatch):
    """A copy over an older one of the same name has no manifest until all of it is there."""
    source, target = tmp_path / "batch-000005", tmp_path / "copy"
    for folder, text in ((source, "new"), (target, "old")):
        (folder / "resume").mkdir(parents=True)
        for name in ("a.json", "manifest.json", "model.safetensors", "resume/shard"):
            (folder / name).write_text(text)
    copy_files, seen = fs.copy_files, []

    def watched(entry: str, there: str, **options) -> None:
        seen.append((Path(entry).name, (target / "manifest.json").exists()))
        copy_files(entry, there, **options)

    monkeypatch.setattr(fs, "copy_files", watched)
    copy_folder(source, str(target))
    assert sorted(seen[:-1]) == [("a.json", False), ("model.safetensors", False), ("resume", False)]
    assert seen[-1] == ("manifest.json", False)
    assert all((target / name).read_text() == "new" for name in ("manifest.json", "resume/shard"))


def test_a_finished_training_is_gone_on_with_from_its_final_model(tmp_path):
    checkpoints = checkpoints_of(tmp_path, 2)
    save(checkpoints, RunState(batches=5))
    save(checkpoints, RunState(batches=8), "final")
    folder, state = checkpoints.latest() or pytest.fail("none")
    assert (folder.name, state.batches) == ("final", 8)


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    save(checkpoints_of(tmp_path, 2), RunState(batches=5))
    with pytest.raises(ConfigError, match=r"batch-000005' was made with another config"):
        checkpoints_of(tmp_path, 2, None, "--learner.lr", "1e-3").latest()
    assert checkpoints_of(tmp_path, 2, None, "--rollout.actors", "1").latest()


def test_a_checkpoint_of_an_earlier_release_loads(tmp_path):
    """Its manifest had no fingerprint, and counters of its own."""
    checkpoints = checkpoints_of(tmp_path, 2)
    save(checkpoints, RunState(batches=5))
    file = checkpoints.folder / "batch-000005" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["config_fingerprint"]
    file.write_text(json.dumps(manifest | {"gone": 1}))
    assert (checkpoints.latest() or pytest.fail("none"))[1] == RunState(batches=5)


@pytest.mark.parametrize(
    ("override", "different"),
    [
        (("--pipeline.staleness", "1"), "pipeline.staleness was 0 and is 1"),
        (("--pipeline.max_batches", "10"), "pipeline.max_batches was 330 and is 10"),
        (("--learner.lr", "1e-3"), "learner.lr was 0.0006 and is 0.001"),
    ],
)
def test_a_resume_that_would_train_something_else_is_refused(tmp_path, override, different):
    before = load_config("tiny", ["--output_dir", str(tmp_path)])
    write_resolved_config(before)
    check_same_run(load_config("tiny", ["--output_dir", str(tmp_path), "--rollout.actors", "1"]))
    with pytest.raises(ConfigError, match=f"--resume: the config differs from the run's: {different}\\. Use"):
        check_same_run(load_config("tiny", ["--output_dir", str(tmp_path), *override]))


def test_the_manifest_holds_length_and_sha256_of_every_file(tmp_path):
    checkpoints = checkpoints_of(tmp_path, 2)
    save(checkpoints, RunState(batches=5))
    manifest = json.loads((checkpoints.folder / "batch-000005" / "manifest.json").read_text())
    assert manifest["files"] == {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in (("model.safetensors", "5"), ("resume/shard", "states"))
    }


def test_a_manifest_has_every_counter_of_a_run():
    for state, read in ((RunState, Manifest), (Feedback, FeedbackFields)):
        assert {f.name for f in fields(state)} <= read.model_fields.keys()


def test_a_manifest_that_knows_lengths_only_is_read(tmp_path):
    """Of an earlier release."""
    checkpoints = checkpoints_of(tmp_path, 2)
    save(checkpoints, RunState(batches=5))
    file = checkpoints.folder / "batch-000005" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"files": {"resume/shard": 6}}))
    assert checkpoints.latest()
    truncated(file.parent / "resume" / "shard")
    with pytest.raises(ConfigError, match="resume/shard has 3 bytes, not 6 bytes"):
        checkpoints.latest()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("manifest.json", lambda file: file.write_text(""), "manifest.json cannot be read"),
        ("manifest.json", truncated, "manifest.json cannot be read"),
        ("manifest.json", lambda file: file.write_text("[]"), "manifest.json: "),
        ("manifest.json", lambda file: file.write_bytes(b"\xff"), "manifest.json cannot be read"),
        (
            "manifest.json",
            lambda file: file.write_text('{"batches": -1, "updates": 0}'),
            "manifest.json: batches: -1 is not accepted",
        ),
        ("manifest.json", lambda file: file.write_text('{"batches": 5}'), "manifest.json: updates: missing"),
        (
            "manifest.json",
            lambda file: file.write_text('{"batches": 5, "updates": 1, "feedback": [1]}'),
            "manifest.json: feedback: expected fields below it, found [1]",
        ),
        ("resume/shard", truncated, "resume/shard has 3 bytes, not 6 bytes"),
        ("resume/shard", lambda file: file.unlink(), "resume/shard has no file, not 6 bytes"),
        ("model.safetensors", truncated, "model.safetensors has 1 bytes, not 2 bytes"),
        ("resume/shard", lambda file: file.write_text("statez"), "resume/shard has the SHA-256 "),
        ("model.safetensors", lambda file: file.write_text("99"), "model.safetensors has the SHA-256 "),
    ],
)
def test_the_newest_whole_checkpoint_counts_and_what_is_wrong_with_a_newer_one_is_said(tmp_path, name, damage, said):
    checkpoints = checkpoints_of(tmp_path, 3)
    for batches in (5, 10):
        save(checkpoints, RunState(batches=batches))
    damage(checkpoints.folder / "batch-000010" / name)
    folder, state = checkpoints.latest() or pytest.fail("none")
    assert (folder.name, state.batches) == ("batch-000005", 5)
    (damaged,) = checkpoints.damaged
    assert damaged.startswith("checkpoint batch-000010 is not whole and is left aside: ") and said in damaged
    damage(checkpoints.folder / "batch-000005" / name)
    with pytest.raises(ConfigError, match=r"--resume: checkpoint batch-000010 .*batch-000005 .* No other is left"):
        checkpoints.latest()


def test_a_final_model_that_is_not_whole_is_trained_again_from_the_newest_checkpoint(tmp_path):
    checkpoints = checkpoints_of(tmp_path, 3)
    save(checkpoints, RunState(batches=5))
    save(checkpoints, RunState(batches=8), "final")
    truncated(checkpoints.folder / "final" / "model.safetensors")
    assert (checkpoints.latest() or pytest.fail("none"))[0].name == "batch-000005"


def test_data_that_changed_since_the_checkpoint_is_refused_unless_accepted(tmp_path):
    before = {"data.prompts": "a", "model.path": "b"}
    save(checkpoints_of(tmp_path, 2, data=before), RunState(batches=5))
    assert checkpoints_of(tmp_path, 2, data=before).latest()
    changed = checkpoints_of(tmp_path, 2, data={"data.prompts": "x", "model.path": "b"})
    with pytest.raises(ConfigError, match=r"--resume: what data\.prompts holds has changed since batch-000005 was"):
        changed.latest()
    folder, state = changed.latest(accept_changed_data=True) or pytest.fail("none")
    assert (folder.name, state.batches) == ("batch-000005", 5)
    save(checkpoints_of(tmp_path, 2, data=before), RunState(batches=8), "final")
    assert changed.latest(), "a finished training reads no prompts"
