"""Only a run of this program is replaced, nothing else in its folder and nothing that is in use."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from common.config.errors import ConfigError
from common.config.file import load_config
from common.config.run import RunConfig
from deploy.files import replace_text
from deploy.named_files import check_writable
from deploy.run_folder import check_run_dir, clear_run_dir, foreign_entries
from deploy.run_lock import RunLock

FILES = ("metrics.jsonl", "events.jsonl", "trajectories.jsonl", "wandb_id", ".status.json.partial")
FOLDERS = ("tensorboard", "wandb", "spool", "checkpoints/batch-000010", "checkpoints/.batch-000020.partial")


def config(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("tiny", ["--output_dir", str(tmp_path / "runs"), *overrides])


def write_run(settings: RunConfig, finished: bool = False) -> Path:
    """A folder as a run leaves it."""
    folder = settings.run_dir
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text('{"batch": 0}\n')
    replace_text(folder / "config.yaml", yaml.safe_dump(settings.model_dump(mode="json")))
    replace_text(folder / "status.json", json.dumps({"state": "training"}))
    if finished:
        (folder / "summary.json").write_text("{}")
        (folder / "checkpoints/final").mkdir()
    return folder


def refused(settings: RunConfig, overwrite: bool = True) -> str:
    before = sorted(settings.run_dir.rglob("*"))
    with pytest.raises(ConfigError) as error:
        check_run_dir(settings, overwrite)
    if overwrite:
        with pytest.raises(ConfigError):
            clear_run_dir(settings)
    assert sorted(settings.run_dir.rglob("*")) == before
    return str(error.value)


def test_an_earlier_run_is_replaced_only_when_asked(tmp_path, capsys):
    settings = config(tmp_path)
    folder = write_run(settings)
    assert "holds an unfinished run; choose another --name, or replace it with --overwrite, or go on" in refused(
        settings, overwrite=False
    )
    (folder / "summary.json").write_text("{}")
    assert "holds a finished run; choose another --name, or replace it with --overwrite" in refused(
        settings, overwrite=False
    )
    check_run_dir(settings, overwrite=True)
    assert (folder / "summary.json").exists()  # checking removes nothing
    clear_run_dir(settings)
    assert f"--overwrite: removing '{folder}'" in capsys.readouterr().err
    assert list(folder.parent.iterdir()) == []


def test_a_name_that_looks_like_a_number_spares_the_run_of_that_number(tmp_path):
    other = write_run(config(tmp_path, "--name", "1.1"), finished=True)
    settings = config(tmp_path, "--name", "1.10")
    check_run_dir(settings, overwrite=True)
    clear_run_dir(settings)
    assert (other / "summary.json").exists() and settings.run_dir == tmp_path / "runs" / "1.10"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("thesis.tex", "thesis.tex"),
        ("eval.json", "eval.json"),
        ("b/config.yaml", "b"),
        (".hidden", ".hidden"),
        ("x.partial", "x.partial"),
        ("checkpoints/mine/model", "checkpoints/mine"),
        ("checkpoints/final.bak/model", "checkpoints/final.bak"),
    ],
)
def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, file, said):
    settings = config(tmp_path)
    own = write_run(settings, finished=True) / file
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("years of work")
    assert f"holds '{said}', which no run has written, so it is not replaced; move that away" in refused(settings)
    assert own.read_text() == "years of work"


@pytest.mark.parametrize("content", [None, "", "{}", "- a", "services: {web: {}}", "\x00", "model: [\n"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, content):
    settings = config(tmp_path)
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "metrics.jsonl").write_text("years of work")
    if content is not None:
        (settings.run_dir / "config.yaml").write_text(content)
    assert "is not the folder of a run, so it is not replaced" in refused(settings)


def test_a_parent_of_runs_is_left_alone(tmp_path):
    write_run(config(tmp_path, "--name", "a"))
    assert "is not the folder of a run" in refused(
        load_config("tiny", ["--output_dir", str(tmp_path), "--name", "runs"])
    )
    write_run(load_config("tiny", ["--output_dir", str(tmp_path / "runs/a"), "--name", "b"]))
    assert "holds 'b', which no run has written" in refused(config(tmp_path, "--name", "a"))


def test_a_link_is_not_followed(tmp_path):
    target = write_run(config(tmp_path, "--name", "a"))
    link = config(tmp_path, "--name", "b")
    link.run_dir.symlink_to(target)
    assert f"'{link.run_dir}' is a link to '{target}', which --overwrite does not follow" in refused(link)


def test_a_linked_parent_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    settings = config(tmp_path)
    write_run(settings)
    clear_run_dir(settings)
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    settings = config(tmp_path)
    (tmp_path / "runs").mkdir()
    settings.run_dir.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"cannot write in .*Not a directory"):
            check_run_dir(settings, overwrite)
    assert settings.run_dir.read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "file"),
    [
        ("model.path", "checkpoints/final"),
        ("teacher.path", "checkpoints/final"),
        ("data.prompts", "trajectories.jsonl"),
        ("data.responses", "spool"),
        ("evaluation.problems", "metrics.jsonl"),
    ],
)
def test_what_the_new_run_reads_is_not_removed(tmp_path, field, file):
    settings = config(tmp_path)
    folder = write_run(settings, finished=True)
    assert f"{field}: '{folder}/{file}' lies in '{folder}', which --overwrite would remove" in refused(
        config(tmp_path, f"--{field}", str(folder / file))
    )
    (tmp_path / "link").symlink_to(folder / file)
    assert "which --overwrite would remove" in refused(config(tmp_path, f"--{field}", str(tmp_path / "link")))


def test_copies_do_not_go_into_the_run_itself(tmp_path):
    folder = config(tmp_path).run_dir
    for target in (folder, folder / "checkpoints", folder / "copies"):
        with pytest.raises(ConfigError, match=r"copy_checkpoints_to: .* lies in the run's own folder"):
            check_run_dir(config(tmp_path, "--pipeline.copy_checkpoints_to", str(target)), overwrite=False)
    check_run_dir(config(tmp_path, "--pipeline.copy_checkpoints_to", str(tmp_path / "copies")), overwrite=False)


def test_the_folder_one_is_in_is_not_removed(tmp_path, monkeypatch):
    settings = config(tmp_path)
    monkeypatch.chdir(write_run(settings) / "checkpoints")
    assert "is the folder you are in" in refused(settings)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_live_run_is_refused_and_named(tmp_path, overwrite):
    settings = config(tmp_path)
    write_run(settings)
    with RunLock(settings.run_dir):
        said = refused(settings, overwrite)
    assert f"is the folder of a run in progress (process {os.getpid()} on {socket.gethostname()}, last heard of" in said


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for folder in (
        "/proc/x",
        "/proc/1/x",
        "/dev/null/x",
        "/dev/null",
        str(file),
        str(file / "x/y"),
        str(tmp_path / "dangling/x"),
    ):
        settings = load_config("tiny", ["--output_dir", folder])
        for overwrite in (False, True):
            with pytest.raises(ConfigError) as error:
                check_run_dir(settings, overwrite)
            assert str(error.value).startswith(f"output_dir: cannot write in '{folder}/tiny' (")
    check_writable("x", tmp_path / "a/b/c")
    assert not (tmp_path / "a").exists()


def test_every_file_of_a_run_is_known(tmp_path):
    folder = write_run(config(tmp_path), finished=True)
    assert foreign_entries(folder) == []
    shutil.rmtree(folder / "checkpoints")
    assert foreign_entries(folder) == []
