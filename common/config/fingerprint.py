"""What of a config changes what is trained, as one value: the identity of a training, whatever machine runs it.

It stands in the manifest of every checkpoint and in `summary.json`, and is compared before a run or an arm of an
ablation is believed finished, and before one is resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.fields import is_tag, path_fields
from common.config.file import value_at
from common.config.paths import path_use
from common.config.run import RunConfig
from common.config.teacher import TeacherConfig


def fingerprint(config: RunConfig) -> str:
    """64 hexadecimal digits over the fields that change what is trained.

    A field with its default value does not count, so that a field that a later version adds leaves old runs as they
    are. Nor does a path: what lies there is compared by its content.
    """
    chosen = {path: value for path, value, is_default in _training_fields(config) if not is_default}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def evaluation_fingerprint(config: RunConfig) -> str:
    """64 hexadecimal digits over what decides the results of the evaluations; without held-out prompts their fields do
    not count, so that runs of earlier versions stay as they are."""
    held_out = set() if config.evaluation.held_out_prompts else {"held_out_prompts", "held_out_tokens"}
    values = config.evaluation.model_dump(mode="json", exclude={"every_batches", *held_out})
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def input_paths(config: RunConfig) -> dict[str, str | None]:
    """Where everything lies that the run reads, by dotted field."""
    found = {field: value_at(config, field) for field in path_fields("input")}
    found |= {f"teacher.others.{i}.path": other.path for i, other in enumerate(config.teacher.others)}
    return {field: None if path is None else str(path) for field, path in found.items()}


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """The fields that would train something else now, each with both values."""
    old, new = ({path: value for path, value, _ in _training_fields(config)} for config in (before, now))
    return [
        f"{path} was {old.get(path)!r} and is {new.get(path)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def changes_training(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return bool(extra.get("changes_training", True)) if isinstance(extra, dict) else True


def _training_fields(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(dotted path, value as JSON, whether it is the default) of every plain field; the choice itself never counts as
    default, since the fields of two choices may all be."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if not changes_training(field) or path_use(field.annotation, field.metadata) == "input":
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _training_fields(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], TeacherConfig):
            yield prefix + name, len(value), False
            for i, item in enumerate(value):
                yield from _training_fields(item, f"{prefix}{name}.{i}.")
        else:
            yield prefix + name, values[name], value == field.default and not is_tag([name])
