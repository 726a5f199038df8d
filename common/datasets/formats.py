"""The rows of one file: JSON, JSONL, CSV or Parquet, plain or compressed with gzip or zstd.

Every row comes with its place (file and line, row or entry), so that whatever is wrong with it can be named.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from common.datasets.errors import PromptError

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # what a file begins with, whatever its name
_BYTE_ORDER_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LINE_END = re.compile(r"\r\n|\r|\n")  # not splitlines: text may hold U+2028
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BATCH_ROWS = 1024


def format_of(file: PurePath) -> str | None:
    """The suffix that says how a file is read, in lower case and without that of its compression; None: unknown."""
    name = PurePath(file.name.lower())
    suffix = PurePath(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix
    return suffix if suffix in _READERS else None


def stem_of(file: PurePath) -> str:
    """The file's name without the suffixes of its format and compression."""
    name = file.name
    if PurePath(name.lower()).suffix in _COMPRESSIONS:
        name = PurePath(name).stem
    return PurePath(name).stem


def known_formats() -> str:
    """All suffixes, for messages."""
    return f"{', '.join(_READERS)} (also with {' or '.join(_COMPRESSIONS)} behind it)"


def read_file(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of every row.

    Raises:
        PromptError: the file is of an unknown format, unreadable, damaged or empty, or a row is no object.
    """
    suffix = format_of(file)
    if suffix is None:
        raise PromptError(f"{str(file)!r} is none of {known_formats()}; convert or rename it")
    count = 0
    for place, record in _READERS[suffix](file, _content(file)):
        if not isinstance(record, dict):
            raise PromptError(f"{place}: expected an object with fields, found {type(record).__name__}")
        count += 1
        yield place, record
    if not count:
        raise PromptError(f"{str(file)!r} is empty; fill it or remove it")


def read_lines(file: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines of a text file, stripped, without the blank ones.

    Raises:
        PromptError: the file cannot be read or is not text.
    """
    lines = _LINE_END.split(_text(file, _content(file)))
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def _content(file: Path) -> bytes:
    """The file's bytes, decompressed."""
    compression = _COMPRESSIONS.get(file.suffix.lower())
    try:
        data = file.read_bytes()
        compression = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), compression)
        if compression and not data.startswith(_LFS_POINTER):
            data = pa.CompressedInputStream(pa.BufferReader(data), compression).read()
    except (OSError, pa.ArrowException) as error:
        how = f"as {compression} " if compression else ""
        raise PromptError(f"{str(file)!r} cannot be read {how}({error}); write it again, or name it rightly") from error
    if data.startswith(_LFS_POINTER):
        raise PromptError(f"{str(file)!r} is a pointer of Git LFS, not the file itself; bring it with git lfs pull")
    return data


def _text(file: Path, data: bytes) -> str:
    """Text in UTF-8, or in what the byte order mark says; the mark is no part of it."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"byte 0x{data[error.start]:02x}" if error.start < len(data) else "cut short"
        raise PromptError(
            f"{file}, line {line}: not {encoding[:6].upper()} text ({wrong}); save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PromptError(
            f"{file}, line {line}: holds a NUL character, as UTF-16 without a byte order mark does; save it as UTF-8"
        )
    return text


def _whole_number(digits: str) -> int | str:
    """Python reads no number of more than some thousand digits; such a one stays text."""
    most = sys.get_int_max_str_digits()
    return digits if most and len(digits) > most else int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice, one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        double = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise _DoubleKeyError(f"the key {double!r} stands twice")
    return found


class _DoubleKeyError(ValueError):
    """In one object."""


_JSON = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_object)


def _parse_json(place: str, text: str) -> Any:
    """Raises json.JSONDecodeError, or PromptError where it is nested too deep."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise PromptError(f"{place}: nested too deep to be read; remove the field that is") from error
    except _DoubleKeyError as error:
        raise PromptError(f"{place}: {error}; remove one of them") from error


def _read_jsonl(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_LINE_END.split(_text(file, data)), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                yield place, _parse_json(place, line)
            except json.JSONDecodeError as error:
                raise PromptError(f"{place}: not valid JSON ({error.msg}); fix or remove the line") from error


def _read_json(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        records = _parse_json(str(file), _text(file, data).strip() or "[]")
    except json.JSONDecodeError as error:
        hint = "one object a line belongs in a .jsonl file" if error.msg == "Extra data" else "fix it"
        raise PromptError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}); {hint}") from error
    if not isinstance(records, list):
        raise PromptError(f"{file}: expected a JSON list of objects, found {type(records).__name__}")
    for row, record in enumerate(records, start=1):
        yield f"{file}, entry {row}", record


def _read_csv(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Every field is text as it stands; the delimiter is the one that the header line has, or Excel's `sep=;` names."""
    text = _text(file, data)
    first = text[:6].rstrip("\r\n")
    named = first[4:] if first.startswith("sep=") and len(first) == 5 else ""
    header_line = [*_LINE_END.split(text, maxsplit=2), ""][bool(named)]
    delimiter = named or next((d for d in ",;\t" if d in header_line), ",")
    csv.field_size_limit(2**31 - 1)  # the default refuses fields of more than 128 KiB
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        if named:
            next(rows)
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header) or not all(header):
            raise PromptError(
                f"{file}, line {rows.line_num}: the header {header} has an empty or a double name; rename it"
            )
        for row in rows:
            place = f"{file}, line {rows.line_num}"
            if row and len(row) != len(header):
                raise PromptError(
                    f"{place}: {len(row)} fields, but the header has {len(header)}; put fields that hold "
                    f"{delimiter!r} in double quotes"
                )
            if row:
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise PromptError(f"{file}, line {rows.line_num}: not valid CSV ({error}); fix it") from error


def _read_parquet(file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    done = 0
    try:
        with parquet.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise PromptError(f"{file}: two columns have the same name ({', '.join(names)}); rename one")
            for batch in table.iter_batches(_BATCH_ROWS):
                for row, record in enumerate(_rows(file, batch, done), start=done + 1):
                    yield f"{file}, row {row}", record
                done += len(batch)
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise PromptError(f"{file}, after row {done}: not valid Parquet ({said}); write it again") from error


def _rows(file: Path, batch: pa.RecordBatch, done: int) -> list[dict[str, Any]]:
    """The batch's rows; `done` rows of the file came before it."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time that Python does not have
        row, name = next((r, n) for r in range(len(batch)) for n in batch.schema.names if not _readable(batch[n][r]))
        raise PromptError(
            f"{file}, row {done + row + 1}: the value in column {name!r} cannot be read ({error}); fix it or remove "
            "the column"
        ) from error


def _readable(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except (ValueError, OverflowError):
        return False
    return True


_READERS: dict[str, Callable[[Path, bytes], Iterator[tuple[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
