"""`opdlm eval` dealt out to processes of a Ray that it starts: the same responses as in one process."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from common.config.file import REPOSITORY
from common.conversion import convert_folder
from deploy import cli

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ARLM = str(REPOSITORY / "deploy/models/tiny-arlm")
PROBLEMS = str(REPOSITORY / "deploy/data/word_problems_heldout.jsonl")


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.long), ("--temperature", "1", "--samples", "2", "--seeds", "2")]
)
def test_processes_give_what_one_process_gives(tmp_path: Path, options, monkeypatch):
    monkeypatch.setattr("deploy.evaluation.sweep._CHUNK", 8)
    convert_folder(ARLM, tmp_path / "student", 4, "<|mask|>", torch.float32)
    command = [
        "eval", str(tmp_path / "student"), "--problems", PROBLEMS, "--original", ARLM, "--count", "20", "--slots", "8",
        "--max-new-tokens", "24", *options,
    ]  # fmt: skip
    found = {}
    for name, more in (("one", []), ("two", ["--actors", "2"])):
        output = tmp_path / f"{name}.json"
        result = CliRunner().invoke(cli.app, [*command, *more, "--output", str(output)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        report = json.loads(output.read_text())
        assert report["processes"] == (2 if more else 1)
        lines = (tmp_path / f"{name}.problems.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    assert len(found["one"]) == 3 * 20 * (4 if options else 1)
    assert found["one"] == found["two"]
