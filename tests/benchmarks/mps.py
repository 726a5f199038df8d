"""NVIDIA's Multi-Process Service for the benchmark's processes: the roles' kernels run side by side on one GPU."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = "nvidia-cuda-mps-control"
_QUIT = b"quit -t 20\n"  # its clients have ended by then, or are ended


@contextmanager
def multi_process_service(wanted: bool) -> Iterator[dict[str, str]]:
    """The environment of processes that use it, while it runs; without `wanted` an empty one.

    Raises:
        FileNotFoundError: its program is not installed.
        CalledProcessError: it could not be started.
    """
    if not wanted:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps") as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run([_CONTROL, "-d"], env=os.environ | places, check=True)
        try:
            yield places
        finally:
            subprocess.run([_CONTROL], input=_QUIT, env=os.environ | places, check=True)
