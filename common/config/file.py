"""Reading a run's configuration: a YAML file or a preset's name, with overrides from the command line.

Every error names the field, the value and the remedy. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from common.config.errors import ConfigError, explain
from common.config.fields import default_tag, is_tag, path_fields, place_of
from common.config.paths import expanded
from common.config.renamed import old_names, with_new_names
from common.config.run import RunConfig
from common.config.section import plain_types
from common.config.shown import shown
from common.config.teacher import first_with_others
from common.config.yaml_loader import ConfigLoader, NotOfAConfig, Scalar, is_null

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = REPOSITORY / "deploy" / "presets"
# environment variable of a job: the folder that was uploaded for it. What was not uploaded, such as responses below a
# folder that .gitignore names, is found there if the job's machine has that folder too
SUBMITTED_FROM = "OPDLM_SUBMITTED_FROM"
_EXAMPLE = "overrides look like --learner.lr 1e-4"
_LARGEST_FILE = 2**20  # bytes
_Section = TypeVar("_Section", bound=BaseModel)


def load_config(source: str, overrides: list[str] | Mapping[str, Any] | None = None) -> RunConfig:
    """The validated configuration of a YAML file or a preset (`tiny`), with overrides: `--field.path value` as typed
    on a command line, or values by dotted path.

    A relative path means the current folder; what is not there is looked for where a job was submitted from, and
    among the project's own files.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown, was renamed or has a bad value.
    """
    return _with_found_paths(validated(RunConfig, merged(source, overrides)))


def merged(source: str, overrides: list[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The YAML file or preset with the overrides in it, as `load_config` validates it."""
    raw = read_yaml(find_config(source))
    if "arms" in raw:
        raise ConfigError(f"{source!r} is an ablation, which is several runs; start it with: opdlm ablate {source}")
    return overridden(raw, overrides)


def overridden(raw: dict[str, Any], overrides: list[str] | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The sections of a config with the overrides in them; `raw` itself is changed."""
    if isinstance(overrides, Mapping):
        changes = [(place_of(name.split("."))[0], deepcopy(value)) for name, value in overrides.items()]
    else:
        changes = parse_overrides(overrides or [])
    # a new rule or kind first: it drops the fields of the old choice, and must not drop other overrides; the method
    # too, which sets kinds
    for path, value in sorted(changes, key=lambda item: not (is_tag(item[0]) or item[0] == ["objective", "method"])):
        if isinstance(raw.get("teacher"), list):  # `--teacher.backend` is the first one's, from which others take it
            raw["teacher"] = first_with_others(raw["teacher"])
        _set(raw, path, value)
    if renamed := old_names(raw):
        raise ConfigError("\n".join(renamed))
    return raw


def load_resolved(file: Path) -> RunConfig:
    """The configuration that a run has written, maybe one of an earlier release with other names.

    Raises:
        ConfigError: the file is not YAML, or this release cannot read it.
    """
    try:
        return validated(RunConfig, with_new_names(read_yaml(file)))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def validated(section: type[_Section], raw: dict[str, Any]) -> _Section:
    """What YAML says, as a section.

    Raises:
        ConfigError: one line for each field that is unknown, missing or has a bad value.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e, section) for e in error.errors())) from error


def preset_names() -> list[str]:
    """Presets of runs; an ablation among them is none."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml") if not p.stem.startswith("ablation"))


def parse_overrides(arguments: list[str]) -> list[tuple[list[str], Any]]:
    """(`path`, value) of `--a.b value` and `--a.b=value`.

    A field that takes text gets the text as typed, whatever it would be in YAML (`1.10`, `a #b`, `*`); `null` unsets
    it where it may be unset. Other values are YAML, so `null`, `[1, 2]` and `1e-4` work.

    Raises:
        ConfigError: an argument is not an option, or its value is missing or not YAML.
    """
    parsed = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"unexpected argument {shown(option)}; {_EXAMPLE}")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(
                    f"option {shown(option)} has no value; {_EXAMPLE}; --FIELD=VALUE takes a value that begins with --"
                )
            text = rest.pop(0)
        path, kind = place_of(name.split("."))
        parsed.append((path, _value_of(text, kind, name)))
    return parsed


def _value_of(text: str, kind: Any, name: str) -> Any:
    if plain_types(kind) & {str, Path}:
        return Scalar(text, None) if is_null(text) else text
    try:
        return yaml.load(text, ConfigLoader)
    except yaml.YAMLError as error:
        if kind is Any:
            return text
        raise ConfigError(
            f"--{name}: {shown(text)} is not valid YAML; quote it for the shell, as in '[1, 2]'"
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a config file as YAML says them; see common/config/yaml_loader.py.

    Raises:
        ConfigError: the file cannot be read, is too large, is not YAML or holds no sections.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error.strerror}); give a YAML file that can") from error
    if len(text) > _LARGEST_FILE:
        raise ConfigError(f"{str(path)!r} has {len(text):,} bytes, too many for a config; give a YAML file")
    try:
        raw = yaml.load(text, ConfigLoader)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: not valid YAML: no text in UTF-8 ({error.reason}); give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = "" if isinstance(error, NotOfAConfig) else "; fix the line, or put its text in quotes"
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}{remedy}") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else "a list" if isinstance(raw, list) else shown(raw)
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:`, found {found}")
    return raw


def find_config(source: str, field: str = "CONFIG", wanted: str = "a YAML file, then the overrides") -> Path:
    """A YAML file by its path, or by the name of a preset.

    Raises:
        ConfigError: there is none; says what `field` should be.
    """
    try:
        path = Path(expanded(source))
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error
    for candidate in (path, PRESETS / f"{source}.yaml", *_elsewhere(path)):
        if os.path.isfile(candidate):
            return candidate
    if os.path.exists(path):
        raise ConfigError(f"{field}: {shown(str(path))} is not a file; give {wanted}")
    near = difflib.get_close_matches(source, preset_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no config {shown(str(path))}; {hint}presets are {', '.join(preset_names())}; or give {wanted}")


def _set(raw: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested value; a new `rule` or `kind` drops the fields of the old choice."""
    node = raw
    for depth, name in enumerate(path[:-1], start=1):
        if not isinstance(node.get(name), dict):
            node[name] = default_tag(path[:depth], node)
        node = node[name]
    if is_tag(path) and node.get(path[-1]) != value:
        node.clear()
    node[path[-1]] = value


def _elsewhere(path: str | Path) -> list[Path]:
    """Where a relative path may be that is not in the current folder."""
    submitted_from = os.environ.get(SUBMITTED_FROM)
    return [Path(folder) / path for folder in (submitted_from, REPOSITORY) if folder]


def _with_found_paths(config: RunConfig) -> RunConfig:
    for field in path_fields("input"):
        config = with_value(config, field, _found(value_at(config, field)))
    others = tuple(t.model_copy(update={"path": _found(t.path)}) for t in config.teacher.others)
    return with_value(config, "teacher.others", others)


def _found(path: str | None) -> str | None:
    """A path as it is, or where it is found instead."""
    if not path or os.path.exists(path):
        return path
    return str(next(filter(os.path.exists, _elsewhere(path)), path))


def value_at(config: BaseModel, field: str) -> Any:
    """The value of a field by its dotted path."""
    for name in field.split("."):
        config = getattr(config, name)
    return config


def with_value(config: _Section, field: str, value: Any) -> _Section:
    """A copy with another value of a field, by its dotted path; it is not validated again."""
    name, _, rest = field.partition(".")
    inner = with_value(getattr(config, name), rest, value) if rest else value
    return config.model_copy(update={name: inner})
