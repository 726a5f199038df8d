"""Paths in a config and on the command line: `~` and environment variables are filled in, in one place for all.

A path may hold any character but control characters. A relative one means the current folder, as everywhere.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from common.config.shown import shown

_LONGEST_NAME, _LONGEST_PATH = 255, 3800  # bytes: Linux takes 4095, and a run's files lie below
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_PLACEHOLDER = re.compile(r"\{\{.*\}\}")


@dataclass(frozen=True)
class PathField:
    """Mark of a path's type. `input` is read and also found among the project's own files; `output` is written."""

    use: Literal["input", "output"]


def expanded(text: str) -> str:
    """The path with environment variables (`$NAME`, `${NAME}`) and a leading `~` or `~user` filled in.

    A variable or user that does not exist is an error, unless a file is really called so.

    Raises:
        ValueError: also where it is empty, too long, or holds a control character or a template's placeholder.
    """
    if not text.strip():
        raise ValueError(f"{text!r} is no path; give one")
    if _CONTROL.search(text):
        raise ValueError(f"{shown(text)} holds a line break or another control character; give a path without")
    path = _VARIABLE.sub(lambda match: os.environ.get(match[1] or match[2]) or match[0], text)
    if os.environ.get("HOME") != "":  # an empty one would make /x of ~/x
        path = os.path.expanduser(path)
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(n)) > _LONGEST_NAME for n in path.split("/")):
        raise ValueError(
            f"{shown(path)} is too long for a path; use at most {_LONGEST_NAME} bytes a name and {_LONGEST_PATH} in all"
        )
    if os.path.exists(path):
        return path
    if variable := _VARIABLE.search(path):
        raise ValueError(
            f"{shown(text)}: the environment variable {variable[1] or variable[2]} is not set; set it, or write the "
            "path itself"
        )
    if path.startswith("~"):
        raise ValueError(f"{shown(text)}: no home of {path.split('/')[0]!r} is known; write the path itself")
    if _PLACEHOLDER.search(path):
        raise ValueError(f"{shown(text)} is a placeholder of a template that was not filled in; write the path itself")
    return path


def expanded_unless_url(text: str) -> str:
    return text if "://" in text else expanded(text)


def _folder(value: Any) -> Any:
    return Path(expanded(str(value))) if isinstance(value, str | Path) else value


def template_text(value: str) -> str:
    """The text of a Jinja template, which a field holds itself or as the path of its file."""
    if "{{" in value or "{%" in value:
        return value
    file = Path(expanded(value))
    if not file.is_file():
        raise ValueError(f"{shown(value)} is neither a file nor a Jinja template; give one")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(value)} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


TemplateText = Annotated[str, AfterValidator(template_text)]
InputPath = Annotated[str, AfterValidator(expanded), PathField("input")]
OutputFolder = Annotated[Path, BeforeValidator(_folder), PathField("output")]
OutputUrl = Annotated[str, AfterValidator(expanded_unless_url), PathField("output")]


def path_use(annotation: Any, metadata: list[Any]) -> Literal["input", "output"] | None:
    """Whether a field holds a path: `PathField.use` of its type, where it has that mark."""
    marks = [m for m in (*metadata, *_marks(annotation)) if isinstance(m, PathField)]
    return marks[0].use if marks else None


def _marks(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for argument in typing.get_args(annotation):
        yield from _marks(argument)
