"""docs/python.md: `prepare` and `run`."""

import json

import pytest

from tests.python_examples import run_blocks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_prepare_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(tmp_path, integration=True)
    prepared, summary, run_dir = names["prepared"], names["summary"], names["config"].run_dir
    assert len(prepared.prompts.prompts) == 4096
    assert summary["train"]["updates"] == 2 * 2
    assert 0 <= summary["student"]["dynamic"]["exact_match"] <= 1
    assert json.loads((run_dir / "summary.json").read_text()) == summary
