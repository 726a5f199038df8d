"""What a run read counts by content: another place is the same, another word, order or byte is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from common.config.file import load_config
from common.student import load_tokenizer
from deploy import data_fingerprint
from deploy.data_fingerprint import data_fingerprints, of_files
from deploy.preflight import read_prompts

ROWS = [{"question": f"What is {n} + {n}?", "domain": "math"} for n in range(6)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fingerprints(prompts: str, *overrides: str) -> dict[str, str]:
    config = load_config("tiny", ["--data.prompts", prompts, "--evaluation.problems", "null", *overrides])
    return data_fingerprints(config, read_prompts(config, load_tokenizer(config.model.path))[0])


def test_prompts_count_by_content_and_not_by_path(tmp_path):
    first = fingerprints(write(tmp_path / "a.jsonl", ROWS))
    assert fingerprints(write(tmp_path / "b.jsonl", ROWS)) == first
    assert set(first) == {"data.prompts", "model.path", "teacher.path"}
    for changed in (ROWS[:-1], ROWS[::-1], [{**ROWS[0], "question": "What is 0 + 1?"}, *ROWS[1:]]):
        other = fingerprints(write(tmp_path / "c.jsonl", changed))
        assert other["data.prompts"] != first["data.prompts"]
        assert other["model.path"] == first["model.path"]


def test_a_model_counts_by_its_files(tmp_path):
    model = Path(load_config("tiny").model.path)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert of_files(copy) == of_files(model)
    (copy / ".cache").mkdir()
    (copy / ".cache" / "x").write_text("of a download")
    assert of_files(copy) == of_files(model)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert of_files(copy) != of_files(model)


@pytest.mark.parametrize("place", [0, 3_000, -1])
def test_of_a_large_file_the_ends_and_parts_between_count(tmp_path, monkeypatch, place):
    monkeypatch.setattr(data_fingerprint, "_WHOLE_BYTES", 4_000)
    monkeypatch.setattr(data_fingerprint, "_PARTS", 5)
    monkeypatch.setattr(data_fingerprint, "_PART_BYTES", 1_000)  # at 0, 2250, 4500, 6750 and 9000
    file = tmp_path / "large"
    data = bytearray(os.urandom(10_000))
    file.write_bytes(data)
    before = of_files(file)
    data[place] ^= 1
    file.write_bytes(data)
    assert of_files(file) != before
