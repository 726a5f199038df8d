"""The base of all configuration models."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from common.config.shown import shown
from common.config.yaml_loader import Scalar

# Mark of a field, or of a whole section, that changes how a run goes but not what it trains, rounding aside. It may
# differ when a run goes on. Every field without it changes what is trained.
OPERATION: Final[dict[str, Any]] = {"changes_training": False}

_LARGEST = 2**53  # integers beyond are not exact everywhere


class Section(BaseModel):
    """Unknown keys are errors, instances do not change after validation, numbers are finite.

    A word of YAML (`Scalar`) means what the type of its field says: `name: 1.10` is the text 1.10, `lr: 1.10` a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _words_by_type(cls, fields: Any) -> Any:
        """Before validation: a validator of each field cannot stand where one chooses among sections."""
        if not isinstance(fields, Mapping):
            return fields
        typed, errors = {}, []
        for name, value in fields.items():
            field = cls.model_fields.get(name)
            try:
                typed[name] = as_typed(field.annotation, value) if field else value
            except ValueError as error:
                wrong = PydanticCustomError("value_error", "{text}", {"text": str(error)})
                errors.append(InitErrorDetails(type=wrong, loc=(name,), input=value))
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return typed


def as_typed(annotation: Any, value: Any) -> Any:
    """A value read from YAML, its words taken as the type says; where the type is Any they stay `Scalar`.

    Raises:
        ValueError: an integer is too large, or a text is not Unicode.
    """
    kinds = plain_types(annotation)
    if isinstance(value, Scalar) and Any not in kinds:
        takes_text = kinds & {str, Path} and not (value.value is None and types.NoneType in kinds)
        value = value.text if takes_text else value.value
    if isinstance(value, str):
        if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{shown(value)} is not valid UTF-8; write it in UTF-8")
        return value
    if isinstance(value, bool):
        # a number is due: `true`, which Python takes for 1, is refused as the text that it is
        return str(value).lower() if kinds & {int, float} and bool not in kinds else value
    if isinstance(value, int | float):
        if int in kinds and float not in kinds and math.isfinite(value) and abs(value) > _LARGEST:
            raise ValueError(f"{shown(value)} is too large; use {_LARGEST} or less")
        return value + 0.0 if isinstance(value, float) else value  # no negative zero
    for kind in kinds:
        inner = typing.get_args(kind)
        if isinstance(value, Mapping) and typing.get_origin(kind) is dict:
            return {name: as_typed(inner[1], item) for name, item in value.items()}
        if isinstance(value, list | tuple) and typing.get_origin(kind) is tuple:
            of_item = inner[:1] * len(value) if inner[-1] is ... else [*inner, *inner[-1:] * len(value)]
            return [as_typed(kind, item) for kind, item in zip(of_item, value, strict=False)]
    return value


def plain_types(annotation: Any) -> set[Any]:
    """The types that a value may have: those of a union, and of the values of a Literal; no marks."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return plain_types(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return {kind for argument in arguments for kind in plain_types(argument)}
    if origin is Literal:
        return {type(argument) for argument in arguments}
    return {annotation}


def plain_values(value: Any) -> Any:
    """Nested values read from YAML, for a field whose types are another program's: numbers are numbers there.

    Raises:
        ValueError: a number is not finite.
    """
    if isinstance(value, Scalar):
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number to work with; write a finite one")
    if isinstance(value, dict):
        return {name: plain_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    return value
