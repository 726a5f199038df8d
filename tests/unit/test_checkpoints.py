"""Checkpoints: the manifest comes last, older ones go, finished ones are copied, and what is incomplete is not used."""

import json

import pytest
from pyarrow import fs

from common.config.errors import ConfigError
from common.config.file import load_config
from deploy import preflight
from deploy.checkpoints import Checkpoints, RunState
from deploy.curriculum import Feedback


def save(checkpoints: Checkpoints, state: RunState) -> str:
    name = f"batch-{state.batches:06d}"
    (checkpoints.begin(name) / "resume").mkdir()
    (checkpoints.folder / f".{name}.partial" / "model.safetensors").write_text(str(state.batches))
    return checkpoints.finish(name, state).name


def test_the_newest_are_kept_and_resumed_from(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, copy_to=None)
    assert checkpoints.latest() is None
    states = [RunState(batches=b, updates=8 * b, block_size=4, feedback=Feedback(gates=b)) for b in (5, 10, 15)]
    assert [save(checkpoints, s) for s in states] == ["batch-000005", "batch-000010", "batch-000015"]
    assert [p.name for p in checkpoints.complete()] == ["batch-000010", "batch-000015"]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["batch-000010", "batch-000015"]
    folder, state = checkpoints.latest() or pytest.fail("none")
    assert (folder.name, state) == ("batch-000015", states[-1])


def test_a_checkpoint_without_manifest_is_not_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, copy_to=None)
    save(checkpoints, RunState(batches=5))
    (checkpoints.begin("batch-000010") / "model.safetensors").write_text("half")  # killed while it saved
    (checkpoints.folder / "batch-000015").mkdir()
    folder, _ = checkpoints.latest() or pytest.fail("none")
    assert folder.name == "batch-000005"
    assert list(checkpoints.begin("batch-000010").iterdir()) == []  # the next try begins anew


@pytest.mark.parametrize("scheme", ["", "file://", "fsspec+memory://"])
def test_finished_checkpoints_are_copied_and_stay_when_pruned(tmp_path, scheme):
    place = f"/bucket-{tmp_path.name}" if "memory" in scheme else f"{tmp_path}/copies"
    checkpoints = Checkpoints(tmp_path / "run", keep=1, copy_to=f"{scheme}{place}/")
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
        preflight.check(load_config("tiny", [*overrides, "--pipeline.copy_checkpoints_to", url]))
