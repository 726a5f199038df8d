"""The environment of a process that runs this package again, whatever its working directory."""

from __future__ import annotations

import os

from common.config.file import REPOSITORY


def child_environment() -> dict[str, str]:
    """This process's environment, with the folder of these packages first on PYTHONPATH."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
