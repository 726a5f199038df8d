"""All fields of the config as a table, from the pydantic models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.table import Table

from common.config import RunConfig


def field_table() -> Table:
    """One row per field: dotted name, type, default, description."""
    table = Table(box=None, padding=(0, 1))
    for column in ("field", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for row in rows(RunConfig, ""):
        table.add_row(*row)
    return table


def rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(field, type, default, description) of a section and the sections in it."""
    for name, field in model.model_fields.items():
        sections = list(_sections(field.annotation))
        path = f"{prefix}{name}"
        if len(sections) == 1:
            yield from rows(sections[0], f"{path}.")
        elif sections:
            for section in sections:
                tag = next(f.default for n, f in section.model_fields.items() if n in ("rule", "kind"))
                yield path, "choice", "", f"[bold]{tag}[/bold]: {(section.__doc__ or '').splitlines()[0]}"
                yield from (r for r in rows(section, f"{path}.") if not r[0].endswith((".rule", ".kind")))
        else:
            default = "required" if field.default is PydanticUndefined else str(field.default)
            yield path, _type_name(field.annotation), default, field.description or ""


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _sections(argument)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(a) for a in typing.get_args(annotation))
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
