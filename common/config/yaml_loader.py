"""YAML as a config needs it: 1e-5 is a number, dates and yes/no stay text, and no key may stand twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_FLOAT = re.compile(r"^[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\.(?:inf|nan))$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][\d_]*)$")
_BOOL = re.compile(r"^(?:true|True|false|False)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


class ConfigLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: YAML 1.1 reads 1e-5 as text, 2026-01-01 as a date and `on` as true."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile(r"^<<$"), "<"),
):
    ConfigLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
