"""docs/python.md: `prepare` and `run`."""

import json

import pytest

from common.config.file import REPOSITORY
from tests.python_examples import run_blocks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_prepare_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # for the actors, whose current folder is this one
    names = run_blocks(tmp_path, integration=True)
    config, prepared, summary = names["config"], names["prepared"], names["summary"]
    assert len(prepared.prompts.prompts) == 4096 * config.data.epochs
    rows = 8 * config.rollout.samples_per_prompt
    assert summary["train"]["updates"] == 2 * -(-rows // config.learner.batch_rows)
    assert 0 <= summary["student"]["dynamic"]["exact_match"] <= 1
    assert json.loads((config.run_dir / "summary.json").read_text()) == summary
