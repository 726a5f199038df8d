"""Counts calls into costly files in every process of a run, and reads of its input and output files.

A `sitecustomize` module that imports this one makes Python start it in each process that inherits the environment,
Ray's workers among them. Each event is a line in a file: processes of Ray end by being killed, so nothing may wait for
an end.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

# work of these functions (file and beginning of the name) grows with the vocabulary, the prompts, the config or the
# weights: it is done when a process starts, or with a checkpoint
COSTLY = (
    ("/common/vocabulary.py", ""),
    ("/common/conversion.py", ""),
    ("/common/model_files.py", ""),
    ("/common/prompts.py", "_load"),
    ("/common/prompts.py", "read_rows"),
    ("/common/prompts.py", "tokenised"),
    ("/common/datasets/", ""),
    ("/common/config/file.py", ""),
    ("/common/config/fingerprint.py", ""),
    ("/common/config/yaml_loader.py", ""),
    ("/common/config/run.py", "RunConfig._"),  # its validators
    ("/deploy/data_fingerprint.py", ""),
    ("/deploy/preflight.py", ""),
    ("/deploy/placement.py", ""),
    ("/transformers/tokenization_utils_base.py", "PreTrainedTokenizerBase.from_pretrained"),
    ("/transformers/tokenization_utils_base.py", "PreTrainedTokenizerBase.apply_chat_template"),
    ("/transformers/tokenization_utils_tokenizers.py", "TokenizersBackend.get_vocab"),
    ("/transformers/configuration_utils.py", "PreTrainedConfig.from_pretrained"),
    ("/transformers/configuration_utils.py", "PreTrainedConfig.to_dict"),
    ("/transformers/modeling_utils.py", "PreTrainedModel.from_pretrained"),
    ("/transformers/modeling_utils.py", "PreTrainedModel.save_pretrained"),
)
_OUT, _READ = "OPDLM_CALLS_FILE", "OPDLM_CALLS_READ"  # where to write, and below which folder reads count


def environment(folder: Path, out: Path, read: Path) -> dict[str, str]:
    """What a process needs so that it and its children are counted into `out`; `folder` gets the `sitecustomize`."""
    (folder / "sitecustomize.py").write_text("import tests.call_counts\n\ntests.call_counts.start()\n")
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), _OUT: str(out), _READ: str(read)}


def counted(out: Path) -> Counter[str]:
    """Calls by function, and reads by file, of all processes together."""
    return Counter(out.read_text().splitlines())


def start() -> None:
    """Count from now on in this process, in all threads that Python starts."""
    out = os.open(os.environ[_OUT], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    read = os.environ[_READ]
    costly: dict[Any, str | None] = {}

    def write(line: str) -> None:
        os.write(out, f"{line}\n".encode())

    def on_call(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in costly:
                file, name = code.co_filename, code.co_qualname
                watched = any(part in file and name.startswith(begin) for part, begin in COSTLY)
                costly[code] = f"{file.rpartition('/')[2]} {name}" if watched else None
            if line := costly[code]:
                write(line)

    def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(read):
            mode, flags = arguments[1], arguments[2]
            if (mode or "r")[0] == "r" and not flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
                write(f"read {Path(arguments[0]).name}")

    sys.addaudithook(on_audit)
    sys.setprofile(on_call)
    threading.setprofile(on_call)
