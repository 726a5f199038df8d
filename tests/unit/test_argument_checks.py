"""Arguments of the commands: every path is filled in, every number means something, every output can be written."""

import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from common.config.file import REPOSITORY
from common.config.section import plain_types
from deploy import argument_checks, cli
from deploy.named_files import check_writable

MODEL = str(REPOSITORY / "deploy/models/tiny-arlm")
HELDOUT = str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command in this process that is refused; returns what it says."""

    def call(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["opdlm", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2 and "Traceback" not in err, (arguments, out, err)
        return err.strip()

    return call


def test_every_path_and_every_number_of_every_command_is_checked():
    checks = {Path: {argument_checks.a_path}, float: {argument_checks.finite, argument_checks.temperature}}
    for command in cli.app.registered_commands:
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kinds = plain_types(hint)
            for kind in list(kinds):
                kinds |= plain_types(typing.get_args(kind)[0]) if typing.get_origin(kind) is list else set()
            for kind in kinds & checks.keys():
                (option,) = hint.__metadata__
                assert option.callback in checks[kind], (command.callback, name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "~/x.yaml"],
        ["submit", "~/x.yaml"],
        ["respond", "~/x.yaml", "--output", "o.parquet"],
        ["ablate", "~/x.yaml"],
        ["train", "tiny", "--data.prompts=~/x.yaml", "--teacher.backend", "transformers"],
        ["train", "tiny", "--model.path", "~/x.yaml"],
        ["eval", "~/x.yaml", "--problems", HELDOUT],
        ["eval", MODEL, "--problems=~/x.yaml", "--autoregressive"],
        ["eval", MODEL, "--problems", HELDOUT, "--output=~/x.yaml"],
        ["eval", MODEL, "--problems", HELDOUT, "--plot=~/x.yaml"],
        ["generate", "~/x.yaml", "hello"],
        ["generate", MODEL, "--file=~/x.yaml"],
        ["generate", MODEL, "hello", "--output=~/x.yaml"],
        ["convert", "~/x.yaml", "out"],
        ["dashboard", "~/x.yaml"],
        ["respond", "tiny", "--output=~/x.yaml"],
    ],
)
def test_the_home_is_filled_in_where_the_shell_did_not(refused, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    for typed in ("~", "$HOME", "${HOME}"):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        said = refused(*(a.replace("~", typed) for a in arguments))
        assert f"{tmp_path}/home/x.yaml" in said


def test_what_is_there_is_found_in_the_home(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert f"OUT: '{tmp_path}/out' exists" in refused("convert", MODEL, "~/out")
    (tmp_path / "token").write_text("short")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert f"--token-file: '{tmp_path}/token' holds 5 characters" in refused(
        "dashboard", "~/run", "--token-file=~/token"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", MODEL, "hello", "--temperature"],
        ["generate", MODEL, "hello", "--threshold"],
        ["eval", MODEL, "--problems", HELDOUT, "--temperature"],
        ["eval", MODEL, "--problems", HELDOUT, "--threshold"],
        ["eval", MODEL, "--problems", HELDOUT, "--rule", "entropy_bound", "--bound"],
        ["respond", "tiny", "--output", "o.parquet", "--temperature"],
        ["respond", "tiny", "--output", "o.parquet", "--top-p"],
        ["stop", "job", "--timeout-s"],
    ],
)
def test_a_number_that_is_none(refused, arguments, value):
    assert arguments[-1] in refused(*arguments, value)


def test_a_temperature_too_close_to_zero(refused):
    said = refused("generate", MODEL, "hello", "--temperature", "1e-40")
    assert "--temperature: 1e-40 is too close to 0 to divide by; use 0, which takes the best token, or 0.001" in said


@pytest.mark.parametrize(
    ("path", "said"),
    [("x" * 5000, "is too long for a path"), ("a\nb", "holds a line break"), ("$NO_SUCH/x", "NO_SUCH is not set"),
     ("{{ x }}", "is a placeholder of a template")],
)  # fmt: skip
def test_a_path_that_cannot_be_meant(refused, path, said):
    for arguments in (
        ["train", path], ["ablate", path], ["convert", MODEL, path], ["convert", path, "out"], ["dashboard", path],
        ["generate", path, "hello"], ["generate", MODEL, "hello", f"--output={path}"],
        ["eval", MODEL, f"--problems={path}"], ["respond", "tiny", f"--output={path}"],
        ["submit", "tiny", "--working-dir", path],
    ):  # fmt: skip
        assert said in refused(*arguments)


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x"])
def test_a_place_that_cannot_be_written(refused, tmp_path, place):
    ablation = tmp_path / "ablation.yaml"
    ablation.write_text(f"{{name: x, base: tiny, output_dir: {place}, arms: {{a: {{}}}}}}")
    for arguments in (
        ["train", "tiny", "--output_dir", place], ["ablate", ablation], ["convert", MODEL, place],
        ["make-tiny-arlm", "--out", place], ["respond", "tiny", "--output", f"{place}/o.parquet"],
    ):  # fmt: skip
        assert f"cannot write in '{place}" in refused(*arguments)
    assert "must be a .json file in a folder that exists" in refused(
        "eval", MODEL, "--problems", HELDOUT, "--output", f"{place}/o.json"
    )


def test_an_output_that_is_a_folder(refused, tmp_path):
    for name, arguments in (
        ("o.jsonl", ["generate", MODEL, "hello", "--output"]),
        ("o.json", ["eval", MODEL, "--problems", HELDOUT, "--output"]),
        ("o.png", ["eval", MODEL, "--problems", HELDOUT, "--plot"]),
    ):
        (tmp_path / name).mkdir()
        assert f"{arguments[-1]}: '{tmp_path / name}' must be a " in refused(*arguments, tmp_path / name)


def test_checking_leaves_nothing(tmp_path):
    check_writable("x", tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []
