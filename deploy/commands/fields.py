"""`opdlm fields`: all fields of the config as a table, from the pydantic models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import BaseModel
from rich.table import Table

from common.config.fields import is_tag, sections_of, tag_of
from common.config.run import RunConfig
from deploy.commands.console import console


def register(app: typer.Typer) -> None:
    app.command()(fields)


def fields() -> None:
    """List every field of the config with its type, default and meaning."""
    console.print(field_table())


def field_table() -> Table:
    """One row per field: dotted name, type, default, meaning."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("field", no_wrap=True)  # a name that is cut in two cannot be searched for
    for column in ("type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for row in rows(RunConfig, ""):
        table.add_row(*row)
    return table


def rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(field, type, default, meaning) of a section and the sections in it; a choice lists its options in turn."""
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        path = prefix + name
        if len(inner) == 1:
            yield from rows(inner[0], f"{path}.")
        elif inner:
            tag_name = next(n for n in inner[0].model_fields if is_tag([n]))
            tags = " | ".join(str(tag_of(option)) for option in inner)
            yield f"{path}.{tag_name}", tags, str(tag_of(type(field.default))), f"chooses the fields of {path}"
            for option in inner:
                yield "", "", "", f"[italic]with {tag_of(option)}:[/italic] {(option.__doc__ or '').splitlines()[0]}"
                yield from (row for row in rows(option, f"{path}.") if not is_tag(row[0].split(".")))
        else:
            default = "required" if field.is_required() else str(field.default)
            yield path, type_name(field.annotation), default, field.description or ""


def type_name(annotation: Any) -> str:
    """A type as a person writes it: `float`, `a | b`, `int | None`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if annotation is types.NoneType:
        return "None"
    if arguments:
        return f"{origin.__name__}[{', '.join('...' if a is ... else type_name(a) for a in arguments)}]"
    return str(annotation.__name__)
