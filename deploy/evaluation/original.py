"""The autoregressive model that a student was made from, to be evaluated beside it."""

from __future__ import annotations

from pathlib import Path

from common.config.errors import ConfigError
from common.config.file import load_resolved

NONE = "none"


def original_of(model: str, given: str | None, base: str | None = None) -> tuple[str | None, str]:
    """Folder or hub id of the original, and a sentence that says how it was found, or what to give.

    `given` comes first, then the `base` of an adapter. A checkpoint in a run's folder stands beside the run's config,
    which names the original.
    """
    if given == NONE:
        return None, ""
    if given:
        return given, ""
    if base:
        return base, f"original, the adapter's base: {base}"
    file = Path(model).resolve().parent.parent / "config.yaml"
    if Path(model).resolve().parent.name != "checkpoints" or not file.is_file():
        return None, "no original is evaluated beside the student: give its folder as --original"
    try:
        path = load_resolved(file).model.path
    except ConfigError as error:
        return None, f"no original is evaluated beside the student: {error}; give its folder as --original"
    if not Path(path).is_dir():
        return None, f"no original is evaluated beside the student: {path!r} is not here; give its folder as --original"
    return path, f"original, as the run's config names it: {path}"
