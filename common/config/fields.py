"""The fields of the run's configuration as data: for error messages, overrides and the table of `opdlm fields`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.run import RunConfig

_TAGS = ("rule", "kind")  # fields that choose among sections


def is_tag(path: list[str]) -> bool:
    return path[-1] in _TAGS


def tag_of(section: type[BaseModel]) -> str | None:
    """The value of `rule` or `kind` that chooses this section, if it is one of a choice."""
    return next((str(f.default) for name, f in section.model_fields.items() if name in _TAGS), None)


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold: none for a plain field, several for a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [section for argument in typing.get_args(annotation) for section in sections_of(argument)]
    return []


def section_at(path: list[str]) -> list[type[BaseModel]]:
    """The sections that may stand at a path; a tag in the path (`unmasking.dynamic`) picks one of a choice."""
    sections: list[type[BaseModel]] = [RunConfig]
    for name in path:
        tagged = [s for s in sections if tag_of(s) == name]
        sections = tagged or [
            inner for s in sections if name in s.model_fields for inner in sections_of(s.model_fields[name].annotation)
        ]
    return sections


def default_tag(path: list[str]) -> dict[str, Any]:
    """What an override creates at a path that the file leaves out: a choice starts as its default."""
    parents = section_at(path[:-1])
    default = next((s.model_fields[path[-1]].default for s in parents if path[-1] in s.model_fields), None)
    if isinstance(default, BaseModel) and len(section_at(path)) > 1:
        return {name: value for name, value in default if name in _TAGS}
    return {}


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """(dotted path, its section, field) of every plain field, depth first; those of all options of a choice."""
    for name, field in section.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            yield prefix + name, section, field
        for inner in sections:
            yield from leaves(inner, f"{prefix}{name}.")
