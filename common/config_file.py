"""Reading a run's configuration: a YAML file or a preset's name, with overrides from the command line.

Every error names the field, the value and the remedy. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from common.config import RunConfig

REPOSITORY = Path(__file__).resolve().parent.parent
PRESETS = REPOSITORY / "deploy" / "presets"
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class ConfigError(ValueError):
    """The run cannot start as configured; the message says which field, which value, and what to do."""


def load_config(source: str, overrides: list[str] | None = None) -> RunConfig:
    """The validated configuration of a YAML file or a preset (`tiny`), with `--field.path value` overrides.

    Paths of files that the project ships are found from any folder.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown or has a bad value.
    """
    raw = _read(_find(source))
    for path, value in parse_overrides(overrides or []):
        _set(raw, path, value)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error
    return _with_shipped_paths(config)


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def parse_overrides(arguments: list[str]) -> list[tuple[list[str], Any]]:
    """(`path`, value) of `--a.b value` and `--a.b=value`; values are YAML, so `null`, `[1, 2]` and `1e-4` work.

    Raises:
        ConfigError: an argument is not an option, or has no value.
    """
    parsed = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"unexpected argument {option!r}; overrides look like --learner.lr 1e-4")
        name, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"option {option!r} has no value; overrides look like --learner.lr 1e-4")
            value = rest.pop(0)
        parsed.append((name.replace("-", "_").split("."), _number(yaml.safe_load(value))))
    return parsed


def _find(source: str) -> Path:
    for candidate in (Path(source), PRESETS / f"{source}.yaml", REPOSITORY / source):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"no config {source!r}; give a YAML file, or one of the presets: {', '.join(preset_names())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "somewhere"
        raise ConfigError(f"{path}, {where}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:`, found {type(raw).__name__}")
    return _number(raw)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; everywhere else it is a number."""
    if isinstance(value, str) and _FLOAT.match(value):
        return float(value)
    if isinstance(value, dict):
        return {k: _number(v) for k, v in value.items()}
    return [_number(v) for v in value] if isinstance(value, list) else value


def _set(raw: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested value; a new `rule` or `kind` drops the fields of the old choice."""
    node = raw
    for name in path[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    if path[-1] in ("rule", "kind") and node.get(path[-1]) != value:
        node.clear()
    node[path[-1]] = value


def _explain(error: Any) -> str:
    """One validation error as field, value, what is wrong, remedy."""
    location = [str(part) for part in error["loc"]]
    field = ".".join(p for p in location if p not in _discriminators())
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _fields_at(location[:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_fields_at(location[:-1]))}"
        return f"{field}: unknown field; {hint}"
    if error["type"] == "missing":
        return f"{field}: missing; set it in the config or with --{field} VALUE"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}: {error['input']!r} is not accepted: {message}; change it in the config or with --{field} VALUE"


def _fields_at(location: list[str]) -> list[str]:
    """Field names of the section at `location`, following unions by their tag."""
    section: Any = RunConfig
    for part in location:
        candidates = section if isinstance(section, list) else [section]
        tagged = [c for c in candidates if part in _tags(c)]
        if tagged:
            section = tagged[0]
            continue
        annotations = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
        section = [m for a in annotations for m in _models(a)]
    candidates = section if isinstance(section, list) else [section]
    return sorted({name for c in candidates for name in c.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [m for a in typing.get_args(annotation) for m in _models(a)]
    return []


def _tags(model: type[BaseModel]) -> set[str]:
    return {str(f.default) for name, f in model.model_fields.items() if name in ("rule", "kind")}


def _discriminators() -> set[str]:
    def walk(model: type[BaseModel]) -> set[str]:
        nested = [m for f in model.model_fields.values() for m in _models(f.annotation)]
        return _tags(model).union(*(walk(m) for m in nested))

    return walk(RunConfig)


def _with_shipped_paths(config: RunConfig) -> RunConfig:
    """Paths that do not exist here but ship with the project are taken from there."""

    def shipped(path: str | None) -> str | None:
        if path and not Path(path).exists() and (REPOSITORY / path).exists():
            return str(REPOSITORY / path)
        return path

    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": shipped(config.model.path)}),
            "teacher": config.teacher.model_copy(update={"path": shipped(config.teacher.path)}),
            "data": config.data.model_copy(update={"prompts": shipped(config.data.prompts)}),
            "evaluation": config.evaluation.model_copy(update={"problems": shipped(config.evaluation.problems)}),
        }
    )
