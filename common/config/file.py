"""Reading a run's configuration: a YAML file or a preset's name, with overrides from the command line.

Every error names the field, the value and the remedy. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from common.config.errors import ConfigError, explain
from common.config.fields import default_tag, is_tag
from common.config.renamed import old_names
from common.config.run import RunConfig
from common.config.yaml_loader import ConfigLoader

REPOSITORY = Path(__file__).resolve().parents[2]
PRESETS = REPOSITORY / "deploy" / "presets"
_EXAMPLE = "overrides look like --learner.lr 1e-4"


def load_config(source: str, overrides: list[str] | None = None) -> RunConfig:
    """The validated configuration of a YAML file or a preset (`tiny`), with `--field.path value` overrides.

    Paths of files that the project ships are found from any folder.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown, was renamed or has a bad value.
    """
    raw = _read(_find(source))
    if "arms" in raw:
        raise ConfigError(f"{source!r} is an ablation, which is several runs; start it with: opdlm ablate {source}")
    # a new rule or kind first: it drops the fields of the old choice, and must not drop other overrides
    for path, value in sorted(parse_overrides(overrides or []), key=lambda item: not is_tag(item[0])):
        _set(raw, path, value)
    if renamed := old_names(raw):
        raise ConfigError("\n".join(renamed))
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e) for e in error.errors())) from error
    return _with_shipped_paths(config)


def preset_names() -> list[str]:
    """Presets of runs; an ablation among them is none."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml") if not p.stem.startswith("ablation"))


def parse_overrides(arguments: list[str]) -> list[tuple[list[str], Any]]:
    """(`path`, value) of `--a.b value` and `--a.b=value`; values are YAML, so `null`, `[1, 2]` and `1e-4` work.

    Raises:
        ConfigError: an argument is not an option, or its value is missing or not YAML.
    """
    parsed = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"unexpected argument {option!r}; {_EXAMPLE}")
        name, equals, text = option[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"option {option!r} has no value; {_EXAMPLE}")
            text = rest.pop(0)
        try:
            value = yaml.load(text, ConfigLoader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--{name}: {text!r} is not valid YAML; quote it for the shell, as in '[1, 2]'"
            ) from error
        parsed.append((name.split("."), value))
    return parsed


def _find(source: str) -> Path:
    for candidate in (Path(source), PRESETS / f"{source}.yaml", REPOSITORY / source):
        if candidate.is_file():
            return candidate
    near = difflib.get_close_matches(source, preset_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"no config {source!r}; {hint}give a YAML file or a preset ({', '.join(preset_names())}), then the overrides"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_bytes(), ConfigLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}; mend it") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:`, found {type(raw).__name__}")
    return raw


def _set(raw: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested value; a new `rule` or `kind` drops the fields of the old choice."""
    node = raw
    for depth, name in enumerate(path[:-1], start=1):
        if not isinstance(node.get(name), dict):
            node[name] = default_tag(path[:depth])
        node = node[name]
    if is_tag(path) and node.get(path[-1]) != value:
        node.clear()
    node[path[-1]] = value


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
            "data": config.data.model_copy(
                update={"prompts": shipped(config.data.prompts), "responses": shipped(config.data.responses)}
            ),
            "evaluation": config.evaluation.model_copy(update={"problems": shipped(config.evaluation.problems)}),
        }
    )
