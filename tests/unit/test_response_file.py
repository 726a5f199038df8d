"""The file of `opdlm generate`: written as responses come, whole after an error, gone on with when repeated."""

import datetime
import json
from decimal import Decimal

import pytest

from common.config.errors import ConfigError
from deploy.evaluation.response_file import ResponseFile, as_json

SETTINGS = {"model": "m", "seed": 0}
RECORDS = [as_json({"question": q}) for q in ("a", "b", "a", "c")]


def write(path, indexes, settings=SETTINGS, fails=False):
    with ResponseFile(path, settings, RECORDS) as file:
        for index in indexes:
            file.write(index, {"response": f'to {index}, "response": "'})
        if fails:
            raise KeyboardInterrupt


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_values_without_a_form_in_json_become_text():
    record = {
        "q": "é",
        "asked": datetime.datetime(2024, 1, 1),
        "price": Decimal("1.50"),
        "nan": [float("nan"), {"x": float("inf")}, Decimal("2")],
        "raw": b"a\xff",
        "half": "\ud83d",
    }
    line = as_json(record)
    assert line.isascii()  # as a half character has no other form
    assert json.loads(line) == {
        "q": "é",
        "asked": "2024-01-01T00:00:00",
        "price": "1.50",
        "nan": [None, {"x": None}, "2"],
        "raw": "a\\xff",
        "half": "\ud83d",
    }
    assert as_json({"q": "é"}) == '{"q": "é"}'


def test_responses_are_in_the_file_as_they_come_in_the_order_of_the_prompts(tmp_path):
    path = tmp_path / "o.jsonl"
    seen = []
    with ResponseFile(path, SETTINGS, RECORDS) as file:
        for index in (1, 0, 3, 2):
            file.write(index, {"response": str(index)})
            seen.append([line["response"] for line in lines(path)])
    assert seen == [[], ["0", "1"], ["0", "1"], ["0", "1", "2", "3"]]
    assert lines(path)[1] == {"question": "b", "response": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["o.jsonl"]


def test_an_error_loses_nothing_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "o.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(path, (3, 2), fails=True)
    assert [line["question"] for line in lines(path)] == ["a", "c"]
    path.write_text(path.read_text() + '{"question": "b", "resp')  # a full disk ends in half a line
    with pytest.raises(KeyboardInterrupt):
        write(path, (), fails=True)
    with ResponseFile(path, SETTINGS, RECORDS) as file:
        assert len(file.done) == 2
        for index in sorted({0, 1, 2, 3} - file.done):
            file.write(index, {"response": "later"})
    assert [line["question"] for line in lines(path)] == ["a", "b", "a", "c"]
    assert sum(line["response"] == "later" for line in lines(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["o.jsonl"]


def test_other_settings_do_not_go_on(tmp_path):
    path = tmp_path / "o.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(path, (0,), fails=True)
    before = path.read_text()
    with pytest.raises(ConfigError, match="was left unfinished by a command with other settings; repeat that one"):
        write(path, (0,), {**SETTINGS, "seed": 1})
    assert path.read_text() == before


def test_a_finished_file_is_replaced(tmp_path):
    path = tmp_path / "o.jsonl"
    path.write_text("older\n")
    write(path, range(4))
    assert [line["response"] for line in lines(path)] == [f'to {i}, "response": "' for i in range(4)]


def test_a_full_disk_is_told_and_leaves_what_is_there(tmp_path):
    class Full:
        def __init__(self, file):
            self.file, self.left = file, 60

        def write(self, text):
            self.file.write(text[: self.left])
            self.left -= min(self.left, len(text))
            if not self.left:
                raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "o.jsonl"

    def fill():
        with ResponseFile(path, SETTINGS, RECORDS) as file:
            file._file = Full(file._file)
            for index in range(4):
                file.write(index, {"response": "x" * 20})

    with pytest.raises(OSError, match="No space left on device"):
        fill()
    with ResponseFile(path, SETTINGS, RECORDS) as file:
        assert file.done == {0}
        for index in (1, 2, 3):
            file.write(index, {"response": "later"})
    assert [line["response"] for line in lines(path)] == ["x" * 20, *["later"] * 3]
