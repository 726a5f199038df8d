"""What is wrong with a configuration, as a person needs it: the field, the value, what is wrong, the remedy."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel

from common.config.fields import leaves, section_at, tag_of
from common.config.run import RunConfig
from common.config.shown import shown

_LONGEST_NAME = 60  # characters of a field's name in a message


class ConfigError(ValueError):
    """The run cannot start as configured; the message says which field, which value, and what to do."""


def explain(error: Any, root: type[BaseModel] = RunConfig) -> str:
    """One of pydantic's error dicts, of a validation of `root`, as one line."""
    location = [str(part) for part in error["loc"]]
    path = _without_tags(location, root)
    field = ".".join(_short(part) for part in path)
    given, context = error["input"], error.get("ctx", {})
    value = shown(given)
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    # of a list's item, the whole list is set
    option = ".".join(str(part) for part in error["loc"] if isinstance(part, str)) if _is_item(error["loc"]) else field
    change = "change it in the config" + (f" or with --{option} VALUE" if root is RunConfig else "")
    match error["type"]:
        case "extra_forbidden":
            return f"{field}: unknown field (value {value}); {_suggestion(location, root)}"
        case "missing" if _is_item(error["loc"]):
            return f"{option}: {value} has too few values; {change}"
        case "missing":
            needed = [p for p, _, f in leaves(root) if p.startswith(f"{field}.") and f.is_required()] or [field]
            remedy = f" or with --{needed[0]} VALUE" if root is RunConfig else ""
            return f"{field}: missing; set {needed[0]} in the config{remedy}"
        case "union_tag_invalid" | "union_tag_not_found":
            name = context["discriminator"].strip("'")
            tags = [str(tag_of(section)) for section in section_at(path, root)]
            tag = given.get(name) if isinstance(given, dict) else None
            said = "missing" if tag is None else f"{shown(tag)} is unknown{_near(tag, tags)}"
            return f"{field}.{name}: {said}; choose {', '.join(tags)}"
        case "literal_error":
            options = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{field}: {value} is unknown{_near(given, options)}; choose {', '.join(options)}"
        case "value_error":
            return f"{field}: {message}" if field else message
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{field}: expected fields below it, found {value}" + (
                f"; write them as --{field}.NAME VALUE" if root is RunConfig else "; write NAME: VALUE there"
            )
        case "bool_parsing" | "bool_type":
            message = "it should be true or false"
    return f"{field}: {value} is not accepted, {message}; {change}"


def _is_item(location: tuple[str | int, ...]) -> bool:
    return isinstance(location[-1], int) if location else False


def _short(name: str) -> str:
    """The name of a field as a message shows it."""
    return repr(name)[1:-1] if len(name) <= _LONGEST_NAME else repr(name[:_LONGEST_NAME])[1:-1] + "..."


def _without_tags(location: list[str], root: type[BaseModel]) -> list[str]:
    """Pydantic puts the tag of a choice into the location: rollout.unmasking.dynamic.threshold."""
    return [
        part
        for depth, part in enumerate(location)
        if part not in {tag_of(section) for section in section_at(location[:depth], root)}
    ]


def _suggestion(location: list[str], root: type[BaseModel]) -> str:
    """The field that was probably meant: a like name beside it, else the same name elsewhere."""
    name = location[-1][:_LONGEST_NAME]
    beside = sorted({field for section in section_at(location[:-1], root) for field in section.model_fields})
    near = difflib.get_close_matches(name.replace("-", "_"), beside, n=1, cutoff=0.6)
    if near:
        prefix = ".".join(_without_tags(location, root)[:-1])
        return f"did you mean {f'{prefix}.{near[0]}' if prefix else near[0]}?"
    wanted = name.replace("-", "_")
    options = [(path, section) for path, section, _ in leaves(root) if path.rsplit(".", 1)[-1] == wanted]
    here = ".".join(_without_tags(location, root))
    choices = [str(tag_of(section)) for path, section in options if path == here]
    if choices:
        return f"it belongs to another choice: {' or '.join(choices)}"
    if options:
        return f"did you mean {' or '.join(dict.fromkeys(path for path, _ in options))}?"
    return f"the fields here are {', '.join(beside)}"


def _near(given: Any, options: list[str]) -> str:
    text = given[:_LONGEST_NAME] if isinstance(given, str) else ""
    near = difflib.get_close_matches(text, options, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""
