"""YAML as a config needs it: 1e-5 is a number, dates and yes/no stay text, and what a word means is left to its field.

A word that YAML takes for a number, a boolean or null becomes a `Scalar`, which keeps the text as typed beside that
value; `common.config.section` chooses by the type of the field, so that `name: 1.10` is the text 1.10.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,99})\Z")  # a longer one is a float, and too large for every field
_BOOL = re.compile(r"(?:true|True|false|False)\Z")
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_DEEPEST = 40  # levels
_MOST_NODES = 20_000  # values, with aliases written out


@dataclass(frozen=True)
class Scalar:
    """A number, a boolean or null, and its text: `1.10` has the value 1.1."""

    text: str
    value: float | bool | None

    def __repr__(self) -> str:
        return self.text or "null"


class NotOfAConfig(yaml.MarkedYAMLError):
    """YAML that has no meaning in a config; `problem` says what and the remedy."""


def is_null(text: str) -> bool:
    """Whether YAML reads a word as null."""
    return bool(_NULL.match(text))


class ConfigLoader(yaml.SafeLoader):
    """YAML 1.2's words (YAML 1.1 reads 1e-5 as text, 2026-01-01 as a date and `on` as true), keys that are text and
    stand once, no tags but those of plain values, and a limit on nesting and aliases.

    Every alias gets a copy of its own, so that a change in one place is none in another.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by the id of a complete node: nodes in it, with itself

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, checked; called for each node of the file."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > _DEEPEST:
            raise NotOfAConfig(None, None, f"nested more than {_DEEPEST} levels deep; no field is", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise NotOfAConfig(None, None, "an alias (*name) stands inside of what it names; move it", mark)
        size = 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            size += sum(self._sizes[id(key)] + self._sizes[id(value)] for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self._sizes[id(item)] for item in node.value)
        if size > _MOST_NODES:
            raise NotOfAConfig(None, None, f"more than {_MOST_NODES:,} values; leave some out", mark)
        self._sizes[id(node)] = size
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        match node:
            case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                self.flatten_mapping(node)  # what `<<` names; own keys come last and win
                return {key.value: self.construct_document(value) for key, value in node.value}
            case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                return [self.construct_document(item) for item in node.value]
            case yaml.ScalarNode(tag=tag, value=text) if tag in _WORDS:
                pattern, value_of = _WORDS[tag]
                if pattern.match(text):
                    return value_of(text)
                raise NotOfAConfig(
                    None, None, f"{text[:80]!r} does not fit its tag {tag}; leave the tag out", node.start_mark
                )
        raise NotOfAConfig(
            None, None, f"the tag {node.tag[:80]!r} has no meaning in a config; quote a text with !", node.start_mark
        )


_WORDS: dict[str, tuple[re.Pattern[str], Any]] = {
    "tag:yaml.org,2002:str": (re.compile(""), str),
    "tag:yaml.org,2002:bool": (_BOOL, lambda text: Scalar(text, text.lower() == "true")),
    "tag:yaml.org,2002:int": (_INT, lambda text: Scalar(text, int(text.replace("_", "")))),
    "tag:yaml.org,2002:float": (_FLOAT, lambda text: Scalar(text, float(re.sub(r"\.(?=inf|nan)", "", text)))),
    "tag:yaml.org,2002:null": (_NULL, lambda text: Scalar(text, None)),
}


class ConfigDumper(yaml.SafeDumper):
    """SafeDumper with quotes around text that this loader, or one of YAML 1.1, would take for something else."""


def written(values: dict[str, Any]) -> str:
    """YAML, in ASCII, that `ConfigLoader` reads as the same values."""
    return yaml.dump(values, Dumper=ConfigDumper, sort_keys=False)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.MappingNode):
            raise NotOfAConfig(
                None,
                None,
                "{{ ... }} is a placeholder of a template that was not filled in; fill it in",
                key.start_mark,
            )
        if not isinstance(key, yaml.ScalarNode):
            raise NotOfAConfig(
                None, None, "a list stands where the name of a field is due; write a name", key.start_mark
            )
        if key.value in seen:
            raise NotOfAConfig(None, None, f"key {key.value[:80]!r} stands twice; remove one", key.start_mark)
        seen.add(key.value)


for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<\Z"), "<"),
):
    ConfigLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    ConfigDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
