"""What is wrong with a configuration, as a person needs it: the field, the value, what is wrong, the remedy."""

from __future__ import annotations

import difflib
from typing import Any

from common.config.fields import leaves, section_at, tag_of


class ConfigError(ValueError):
    """The run cannot start as configured; the message says which field, which value, and what to do."""


def explain(error: Any) -> str:
    """One of pydantic's error dicts as one line."""
    path = _without_tags([str(part) for part in error["loc"]])
    field = ".".join(path)
    value, context = error["input"], error.get("ctx", {})
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    change = f"change it in the config or with --{field} VALUE"
    match error["type"]:
        case "extra_forbidden":
            return f"{field}: unknown field (value {value!r}); {_suggestion([str(part) for part in error['loc']])}"
        case "missing":
            needed = [p for p, _, f in leaves() if p.startswith(f"{field}.") and f.is_required()] or [field]
            return f"{field}: missing; set {' and '.join(needed[:1])} in the config or with --{needed[0]} VALUE"
        case "union_tag_invalid" | "union_tag_not_found":
            name = context["discriminator"].strip("'")
            tags = [str(tag_of(section)) for section in section_at(path)]
            given = value.get(name) if isinstance(value, dict) else None
            said = f"{given!r} is unknown{_near(str(given), tags)}" if given else "missing"
            return f"{field}.{name}: {said}; choose {', '.join(tags)}"
        case "literal_error":
            options = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return f"{field}: {value!r} is unknown{_near(str(value), options)}; choose {', '.join(options)}"
        case "value_error":
            return f"{field}: {message}" if field else message
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{field}: expected fields below it, found {value!r}; write them as --{field}.NAME VALUE"
    return f"{field}: {value!r} is not accepted, {message}; {change}"


def _without_tags(location: list[str]) -> list[str]:
    """Pydantic puts the tag of a choice into the location: rollout.unmasking.dynamic.threshold."""
    return [
        part
        for depth, part in enumerate(location)
        if part not in {tag_of(section) for section in section_at(location[:depth])}
    ]


def _suggestion(location: list[str]) -> str:
    """The field that was probably meant: a like name beside it, else the same name elsewhere."""
    name = location[-1]
    beside = sorted({field for section in section_at(location[:-1]) for field in section.model_fields})
    near = difflib.get_close_matches(name.replace("-", "_"), beside, n=1, cutoff=0.6)
    if near:
        prefix = ".".join(_without_tags(location)[:-1])
        return f"did you mean {f'{prefix}.{near[0]}' if prefix else near[0]}?"
    wanted = name.replace("-", "_")
    options = [(path, section) for path, section, _ in leaves() if path.rsplit(".", 1)[-1] == wanted]
    here = ".".join(_without_tags(location))
    choices = [str(tag_of(section)) for path, section in options if path == here]
    if choices:
        return f"it belongs to another choice: {' or '.join(choices)}"
    if options:
        return f"did you mean {' or '.join(dict.fromkeys(path for path, _ in options))}?"
    return f"the fields here are {', '.join(beside)}"


def _near(given: str, options: list[str]) -> str:
    near = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""
