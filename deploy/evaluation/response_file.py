"""The file of `opdlm generate --output`: a line for each prompt, written as the responses come.

Lines are in the order of the prompts: a response waits for those before it, which are decoded at the same time. After
an error, the file has all responses that are done, and FILE.unfinished beside it has the settings they were made with;
the same command then continues.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import defaultdict
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any

from common.config.errors import ConfigError


def as_json(value: Any) -> str:
    """One line of JSON; what it has no form for is written as text: dates, Decimals, bytes, half characters.

    Numbers that are none (NaN, infinity) become null.

    Raises:
        RecursionError: it is nested too deep.
    """
    try:
        line = json.dumps(value, ensure_ascii=False, default=_as_text, allow_nan=False)
    except ValueError:  # NaN somewhere
        line = json.dumps(_without_nan(value), ensure_ascii=False, default=_as_text)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(line))
    return line


def _as_text(value: Any) -> str:
    match value:
        case datetime.date() | datetime.time():
            return value.isoformat()
        case bytes():
            return value.decode(errors="backslashreplace")
    return str(value)


def _without_nan(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nan(part) for key, part in value.items()}
        case list() | tuple():
            return [_without_nan(part) for part in value]
        case float() if not math.isfinite(value):
            return None
        case Decimal():
            return str(value)
    return value


class ResponseFile:
    """Use as a context manager.

    `done`: indexes of the prompts whose responses an earlier, interrupted command left in the file.

    Raises:
        ConfigError: the file was left by a command with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], records: list[str]) -> None:
        """`records`: JSON of each prompt's record, an object with fields; `settings` is what decides the responses."""
        self.path = path
        self.records = records
        self.done: set[int] = set()
        self._order: list[int] = []  # of the lines in the file
        self._next = 0  # the first prompt whose response is not in the file
        self._waiting: dict[int, str] = {}
        self._sidecar = path.with_name(path.name + ".unfinished")
        self._settings = json.dumps(settings, sort_keys=True)

    def __enter__(self) -> ResponseFile:
        kept = self._kept_lines()
        self._order = [index for index, _ in kept]
        self.done = set(self._order)
        self._replace([line for _, line in kept])
        self._sidecar.write_text(self._settings + "\n")
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk, which is being reported
            for index in sorted(self._waiting):
                self._append(index, self._waiting.pop(index))
        self._file.close()
        if kind is None:
            self._finish()

    def write(self, index: int, answer: dict[str, Any]) -> None:
        """The response to prompt `index`, as fields beside those of its record."""
        self._waiting[index] = f"{self.records[index][:-1]}, {as_json(answer)[1:]}"
        while self._next in self.done or self._next in self._waiting:
            if self._next in self._waiting:
                self._append(self._next, self._waiting.pop(self._next))
            self._next += 1

    def _append(self, index: int, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        self.done.add(index)
        self._order.append(index)

    def _kept_lines(self) -> list[tuple[int, str]]:
        """(index, line) of the responses that are in the file; half a last line is dropped."""
        if not self._sidecar.is_file() or not self.path.is_file():
            return []
        if self._sidecar.read_text().strip() != self._settings:
            raise ConfigError(
                f"--output: {str(self.path)!r} was left unfinished by a command with other settings; repeat that one, "
                f"or remove {str(self._sidecar)!r} to start anew"
            )
        indexes: dict[str, list[int]] = defaultdict(list)
        for index in reversed(range(len(self.records))):
            indexes[self.records[index][:-1]].append(index)
        kept = []
        for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
            beginning = line.rpartition(', "response": ')[0]
            if indexes[beginning]:
                kept.append((indexes[beginning].pop(), line))
        return kept

    def _finish(self) -> None:
        """After an interruption the lines may stand in another order."""
        if self._order != sorted(self._order):
            lines = self.path.read_text(encoding="utf-8").split("\n")
            self._replace([line for _, line in sorted(zip(self._order, lines, strict=False))])
        self._sidecar.unlink()

    def _replace(self, lines: list[str]) -> None:
        """The whole file anew, or the one before where that fails."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(self.path)
