"""Where compiled code is kept, so that a run finds what an earlier one compiled: TorchInductor's graphs, Triton's and
DeepSpeed's kernels, and what vLLM compiles.

Each of them finds its entries by hashes of source, versions and GPU, so one folder serves all runs and roles of a
machine, and a copy of it serves other machines with the same software and the same kind of GPU.

Left out: torch.compiler.save_cache_artifacts, one file in place of the folder. It holds what one process compiled,
without Triton kernels that are called outside of compiled code, and somebody would have to load it before each model.
"""

from __future__ import annotations

import os
from pathlib import Path

_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "VLLM_CACHE_ROOT": "vllm",
}


def default_folder() -> Path:
    """In the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opdlm" / "compiled"


def compiled_code_environment(folder: Path | None) -> dict[str, str]:
    """The environment variables of processes that keep their compiled code in `folder`, or in the default one.

    Whether one is set already does not matter: torch sets its own in any process that looks for a cache.
    """
    folder = (folder or default_folder()).absolute()
    return {name: str(folder / part) for name, part in _FOLDERS.items()}
