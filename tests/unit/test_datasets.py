"""Rows of every source: files in all forms, damaged ones, folders with more in them than is meant, data sets."""

import datetime
import decimal
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from common.datasets.errors import PromptError
from common.datasets.folder import split_of
from common.datasets.formats import read_lines
from common.datasets.rows import open_rows

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]


def write(path: Path, content: bytes | str | list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(source, **which):
    return [record for _, record in open_rows(str(source), **which)]


def refusal(source, **which) -> str:
    with pytest.raises(PromptError) as error:
        rows(source, **which)
    return str(error.value)


def content(name: str) -> bytes:
    """The rows as a file of this name, without its compression."""
    if ".parquet" in name:
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(ROWS), sink)
        return sink.getvalue().to_pybytes()
    if ".json" in name.lower() and ".jsonl" not in name.lower():
        return json.dumps(ROWS).encode()
    if ".csv" in name or ".tsv" in name:
        mark = "\t" if ".tsv" in name else ","
        return "\r\n".join(mark.join(row.values()) for row in [{"q": "question", "a": "answer"}, *ROWS]).encode()
    return "\n".join(json.dumps(row) for row in ROWS).encode()


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.JSONL", "r.ndjson", "r.csv", "r.tsv", "r.parquet"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
def test_every_form_gives_the_same_rows(tmp_path, name, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix.lower()]
    assert rows(write(tmp_path / (name + suffix), pack(content(name)))) == ROWS


def test_compressed_files_of_several_members_are_read_whole(tmp_path):
    parts = [(json.dumps(row) + "\n").encode() for row in ROWS]
    assert rows(write(tmp_path / "r.jsonl.gz", b"".join(map(gzip.compress, parts)))) == ROWS
    pack = zstandard.ZstdCompressor().compress
    assert rows(write(tmp_path / "r.jsonl.zst", b"".join(map(pack, parts)))) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_part_of_the_text(tmp_path, encoding, name):
    file = write(tmp_path / name, content(name).decode().encode(encoding))
    assert rows(file) == ROWS
    assert read_lines(write(tmp_path / "p.txt", " How many?\r\n\nAnd é?\rNow?\n".encode(encoding))) == [
        (1, "How many?"),
        (3, "And é?"),
        (4, "Now?"),
    ]


def test_compressed_content_is_read_whatever_the_name(tmp_path):
    assert rows(write(tmp_path / "r.jsonl", gzip.compress(content("r.jsonl")))) == ROWS
    assert rows(write(tmp_path / "r.csv.gz", zstandard.ZstdCompressor().compress(content("r.csv")))) == ROWS


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_every_way(tmp_path, end):
    text = end.join(json.dumps(row) for row in [*ROWS, {"question": "line\u2028separator"}])
    assert rows(write(tmp_path / "r.jsonl", text.replace("\\u2028", "\u2028")))[4]["question"] == "line\u2028separator"
    assert rows(write(tmp_path / "r.csv", f"sep=;{end}question;answer{end}a,b;1{end}")) == [
        {"question": "a,b", "answer": "1"}
    ]


def test_places_name_file_and_line(tmp_path):
    file = write(tmp_path / "r.jsonl", b'{"question": "a"}\n\n{"question": "b"}\n')
    assert [place for place, _ in open_rows(str(file))] == [f"{file}, line 1", f"{file}, line 3"]
    file = write(tmp_path / "r.csv", b'question\n"two\nlines"\nb\n')
    assert [place for place, _ in open_rows(str(file))] == [f"{file}, line 3", f"{file}, line 4"]


def test_csv_is_text_as_it_stands(tmp_path):
    text = 'question;answer\n"a; ""b"""; 007\n'
    assert rows(write(tmp_path / "r.csv", text)) == [{"question": 'a; "b"', "answer": " 007"}]
    long = "x" * 200_000  # more than csv's own limit
    assert rows(write(tmp_path / "long.csv", f"question\n{long}\n")) == [{"question": long}]


def test_numbers_that_python_does_not_read_stay_text(tmp_path):
    digits = "9" * 5000
    file = write(tmp_path / "r.jsonl", f'{{"question": "q", "tests": {digits}, "n": -{digits}, "id": 12}}\n')
    assert rows(file) == [{"question": "q", "tests": digits, "n": f"-{digits}", "id": 12}]


def test_parquet_keeps_types(tmp_path):
    table = {
        "question": pa.array(["a", "b"]).dictionary_encode(),
        "asked": [datetime.datetime(2024, 1, 1)] * 2,
        "price": [decimal.Decimal("1.50")] * 2,
    }
    parquet.write_table(pa.table(table), tmp_path / "r.parquet", row_group_size=1)
    assert rows(tmp_path / "r.parquet")[1] == {
        "question": "b",
        "asked": datetime.datetime(2024, 1, 1),
        "price": decimal.Decimal("1.50"),
    }


def latin1_parquet() -> bytes:
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0")
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff\xfe"))
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"question": text}), sink)
    return sink.getvalue().to_pybytes()


def damaged_parquet(**options) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"question": ["q" * 50 + str(i) for i in range(2000)]}), sink, **options)
    data = bytearray(sink.getvalue().to_pybytes())
    data[100:3000] = bytes(b ^ 0xFF for b in data[100:3000])
    return bytes(data)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.jsonl", b'{"question": "a"}\n{"question": \n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b'{"question": "a"}\n\n["a"]\n', "p.jsonl, line 3: expected an object with fields, found list"),
        ("pipeline.json", b'[\n{"question": "a"},\n{"question" "b"}\n]', "pipeline.json, line 3: not valid JSON"),
        ("p.json", b'{"question": "a"}\n{"question": "b"}\n', "one object a line belongs in a .jsonl file"),
        ("p.json", b'{"question": "a"}', "expected a JSON list of objects, found dict"),
        ("p.json", b'[{"question": "a"}, 3]', "p.json, entry 2: expected an object with fields, found int"),
        ("p.json", b"[]", "p.json' is empty"),
        ("p.jsonl", b"\n\n", "p.jsonl' is empty"),
        ("p.json", b"", "p.json' is empty"),
        ("p.csv", b"question\n", "p.csv' is empty"),
        ("p.csv", b"", "p.csv' is empty"),
        ("p.csv", b"sep=;", "p.csv' is empty"),
        (
            "p.jsonl",
            b'{"question": "a"}\n{"question": "b", "question": "c"}',
            "line 2: the key 'question' stands twice",
        ),
        (
            "p.json",
            b'[{"question": "a", "x": {"y": 1, "y": 2}}]',
            "p.json: the key 'y' stands twice; remove one of them",
        ),
        ("p.jsonl", b'{"question": "a"}\n{"question": "\xe9"}', "p.jsonl, line 2: not UTF-8 text (byte 0xe9)"),
        ("p.csv", "question\nhow?\n".encode("utf-16-le"), "line 1: holds a NUL character, as UTF-16 without"),
        ("p.csv", b"a,b\n1,2,3\n", "p.csv, line 2: 3 fields, but the header has 2; put fields that hold ','"),
        ("p.csv", b'a\n"open\nx\n', "p.csv, line 3: not valid CSV (unexpected end of data)"),
        ("p.csv", b"a,a\n1,2\n", "p.csv, line 1: the header ['a', 'a'] has an empty or a double name"),
        ("p.jsonl", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1: nested too deep to be read"),
        ("p.json", b"[" * 100_000, "p.json: nested too deep to be read"),
        ("p.parquet", b"PAR0", "p.parquet, after row 0: not valid Parquet"),
        ("p.parquet", damaged_parquet(), "p.parquet, after row 0: not valid Parquet (Corrupt snappy"),
        ("p.parquet", damaged_parquet(compression="none", write_page_checksum=True), "not valid Parquet"),
        ("p.parquet", latin1_parquet(), "p.parquet, row 2: the value in column 'question' cannot be read ('utf-8'"),
        ("p.jsonl.gz", b"plain", "p.jsonl.gz' cannot be read as gzip"),
        ("p.jsonl.gz", gzip.compress(b"x" * 100, mtime=0)[:20], "p.jsonl.gz' cannot be read as gzip (Truncated"),
        ("p.jsonl.zst", b"plain", "p.jsonl.zst' cannot be read as zstd"),
        ("p.jsonl", LFS, "p.jsonl' is a pointer of Git LFS, not the file itself; bring it with git lfs pull"),
        ("p.parquet", LFS, "is a pointer of Git LFS"),
        ("p.jsonl.gz", LFS, "is a pointer of Git LFS"),
        ("p.xlsx", b"a", "p.xlsx' is none of .json, .jsonl, .ndjson, .csv, .tsv, .parquet (also with .gz or .zst"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, name, data, said):
    assert said in refusal(write(tmp_path / name, data))


def test_a_time_that_python_does_not_have_is_named(tmp_path):
    stamps = pa.array([0, 2**60], pa.timestamp("ms"))
    parquet.write_table(pa.table({"question": ["a", "b"], "asked": stamps}), tmp_path / "r.parquet")
    assert "row 2: the value in column 'asked' cannot be read" in refusal(tmp_path / "r.parquet")


def test_what_does_not_exist(tmp_path):
    assert "nope.jsonl' does not exist; give a JSON, JSONL" in refusal(tmp_path / "nope.jsonl")
    assert "holds no .json, .jsonl" in refusal(tmp_path)
    file = write(tmp_path / "a.jsonl", ROWS)
    assert "is one file; set data.split and data.subset to null" in refusal(file, split="train")
    assert "has no subsets; set data.subset to null" in refusal(tmp_path, subset="main")


def test_a_folder_is_read_in_sorted_order_with_the_folders_in_it(tmp_path):
    write(tmp_path / "b.jsonl.gz", gzip.compress(content("b.jsonl")))
    write(tmp_path / "a" / "z.parquet", content("z.parquet"))
    write(tmp_path / "c.JSON", content("c.json"))
    places = [place for place, _ in open_rows(str(tmp_path))]
    assert [Path(place.split(", ")[0]).name for place in places] == ["z.parquet"] * 4 + ["b.jsonl.gz"] * 4 + [
        "c.JSON"
    ] * 4


def test_what_a_folder_holds_besides_is_left_out_and_said(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl", ROWS)
    write(tmp_path / "checkpoint-500" / "rows.jsonl", ROWS)
    write(tmp_path / "copy-checkpoint.jsonl", ROWS)
    write(tmp_path / "_old" / "a.jsonl", ROWS)
    write(tmp_path / "README.md", "not prompts")
    write(tmp_path / "dataset_info.json", "{}")
    source = open_rows(str(tmp_path))
    assert [record for _, record in source] == ROWS
    assert sorted(source.notes) == [
        f"{tmp_path}: left out 2 hidden (.ipynb_checkpoints, _old)",
        f"{tmp_path}: left out 2 of a checkpoint (checkpoint-500, copy-checkpoint.jsonl)",
        f"{tmp_path}: left out 2 of another kind (README.md, dataset_info.json)",
    ]


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    write(tmp_path / "elsewhere" / "b.jsonl", ROWS[2:])
    folder = write(tmp_path / "linked" / "a.jsonl", ROWS[:2]).parent
    (folder / "more").symlink_to("../elsewhere")
    (folder / "loop").symlink_to("..")
    (folder / "a2.jsonl").symlink_to("a.jsonl")
    source = open_rows(str(folder))
    assert [record for _, record in source] == ROWS
    assert source.notes == (f"{folder}: left out 2 read already, by another link (loop, a2.jsonl)",)
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")
    assert "gone.jsonl' is a link to 'nowhere.jsonl', which does not exist; remove it" in refusal(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "closed" / "b.jsonl", ROWS).parent.chmod(0)
    assert "closed' cannot be read (Permission denied)" in refusal(tmp_path)


def test_one_of_several_splits_is_to_be_named(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", ROWS[:2])
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", ROWS[2:])
    assert "holds several splits, test, train; set data.split to one of them, or to 'all'" in refusal(tmp_path)
    assert "holds no split 'val', only test, train" in refusal(tmp_path, split="val")
    assert rows(tmp_path, split="train") == ROWS[:2]
    assert rows(tmp_path, split="test") == ROWS[2:]
    assert len(rows(tmp_path, split="all")) == 4
    source = open_rows(str(tmp_path), split="train")
    assert source.notes == (f"{tmp_path}: left out 1 of another split (data/test-00000-of-00001.jsonl)",)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("data/dev.json", "validation"),
        ("test/part-1.parquet", "test"),
        ("gsm8k_test.jsonl", "test"),
        ("train_sft-00000-of-00003-abc.parquet", "train_sft"),
        ("validation-00001-of-00002.parquet", "validation"),
        ("word_problems_heldout.jsonl", "test"),
        ("contest.jsonl", ""),
        ("trained.jsonl", ""),
        ("math/algebra.jsonl", ""),
    ],
)
def test_split_of_a_path(path, split):
    assert split_of(Path(path)) == split


def test_the_same_name_in_two_formats_is_refused(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "rows.parquet", content("rows.parquet"))
    assert "have the same name in two formats, so their rows would be used twice" in refusal(tmp_path)


def test_a_saved_data_set_is_read_and_its_split_named(tmp_path):
    found = datasets.Dataset.from_list(ROWS)
    found.save_to_disk(tmp_path / "one")
    assert rows(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": found, "test": found.select([3])}).save_to_disk(tmp_path / "two")
    assert "has several splits, train, test; set data.split to one of them, or to 'all'" in refusal(tmp_path / "two")
    assert rows(tmp_path / "two", split="test") == ROWS[3:]
    assert len(rows(tmp_path / "two", split="all")) == len(ROWS) + 1
    assert "has no split 'x', only train, test" in refusal(tmp_path / "two", split="x")
    damaged = next((tmp_path / "one").glob("*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert "one' cannot be read as a saved data set" in refusal(tmp_path / "one")


def test_the_copy_of_a_hub_data_set_with_subsets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "copy"
    header = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train*\n  - split: test\n"
        f"    path: {name}/test*\n"
        for name in ("main", "other")
    )
    write(folder / "README.md", f"---\nconfigs:\n{header}---\n# A data set\n")
    for name in ("main", "other"):
        write(folder / name / "train.jsonl", [{"question": f"{name} train"}])
        write(folder / name / "test.jsonl", [{"question": f"{name} test"}])
    assert "has several subsets, main, other; set data.subset to one of them" in refusal(folder)
    assert "has several splits, train, test; set data.split" in refusal(folder, subset="main")
    assert rows(folder, subset="other", split="test") == [{"question": "other test"}]
    assert rows(folder, subset="main", split="train[:1]") == [{"question": "main train"}]
    assert "has no split 'x', only train, test" in refusal(folder, subset="main", split="x")


def test_a_hub_data_set_that_cannot_be_brought_says_what_to_do():
    said = refusal("organisation/no-such-data")
    assert "'organisation/no-such-data' is no file or folder here" in said
    assert "hf download organisation/no-such-data --repo-type dataset --local-dir FOLDER, and give FOLDER" in said
