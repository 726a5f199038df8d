"""The fields of the run's configuration as data: for error messages, overrides and the table of `opdlm fields`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.objective import set_by_method
from common.config.paths import path_use
from common.config.run import RunConfig
from common.config.section import plain_types

_TAGS = ("rule", "kind")  # fields that choose among sections


def is_tag(path: list[str]) -> bool:
    """Whether a field chooses among sections; keys of a dictionary that are called so do not."""
    return path[-1] in _TAGS and (len(path) == 1 or bool(section_at(path[:-1])))


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


def section_at(path: list[str], root: type[BaseModel] = RunConfig) -> list[type[BaseModel]]:
    """The sections that may stand at a path; a tag in the path (`unmasking.dynamic`) picks one of a choice, and a
    number (`extra.0`) an item of a list."""
    sections = [root]
    annotations: list[Any] = []
    for name in path:
        if name.isdigit() and not sections:  # an item of a list of sections
            items = [item for a in annotations if typing.get_origin(a) is tuple for item in typing.get_args(a)]
            sections = [section for item in items for section in sections_of(item)]
        elif tagged := [s for s in sections if tag_of(s) == name]:
            sections = tagged
        else:
            annotations = [s.model_fields[name].annotation for s in sections if name in s.model_fields]
            sections = [section for a in annotations for section in sections_of(a)]
    return sections


def default_tag(path: list[str], beside: Mapping[str, Any]) -> dict[str, Any]:
    """What an override creates at a path that the file leaves out: a choice starts as its default, or as the method
    sets it that stands `beside` it."""
    if path[:-1] == ["objective"] and (kind := set_by_method(beside.get("method"), path[-1])):
        return kind
    parents = section_at(path[:-1])
    default = next((s.model_fields[path[-1]].default for s in parents if path[-1] in s.model_fields), None)
    if isinstance(default, BaseModel) and len(section_at(path)) > 1:
        return {name: value for name, value in default if name in _TAGS}
    return {}


def place_of(path: list[str]) -> tuple[list[str], Any]:
    """Where an override's path ends, and the type of the values there; Any where no field is known.

    A dictionary's key is all that follows its name: `labels.ray.io/region` is the key `ray.io/region`.
    """
    for depth, name in enumerate(path):
        types_here = [s.model_fields[name].annotation for s in section_at(path[:depth]) if name in s.model_fields]
        if not types_here:
            break
        if depth == len(path) - 1:
            return path, typing.Union[tuple(types_here)]  # noqa: UP007 - of a list
        for kind in plain_types(types_here[0]):
            value_type = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any
            if value_type is not Any:
                return [*path[: depth + 1], ".".join(path[depth + 1 :])], value_type
    return path, Any


def path_fields(use: str) -> list[str]:
    """Dotted paths of all fields that hold a path of this use; see common/config/paths.py."""
    return [path for path, _, field in leaves() if path_use(field.annotation, field.metadata) == use]


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """(dotted path, its section, field) of every plain field, depth first; those of all options of a choice."""
    for name, field in section.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            yield prefix + name, section, field
        for inner in sections:
            yield from leaves(inner, f"{prefix}{name}.")
