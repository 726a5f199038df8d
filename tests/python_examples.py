"""The code blocks of docs/python.md, run as they stand."""

import re
from pathlib import Path
from typing import Any

from common.config.file import REPOSITORY

PAGE = REPOSITORY / "docs" / "python.md"
_BLOCK = re.compile(r"(<!-- test: integration -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(folder: Path, *, integration: bool) -> dict[str, Any]:
    """Run the blocks that are marked `integration`, or those that are not, in one namespace, which is returned.

    `folder` is the current one and stands for the repository's root.
    """
    (folder / "deploy").symlink_to(REPOSITORY / "deploy")
    names: dict[str, Any] = {}
    for match in _BLOCK.finditer(PAGE.read_text()):
        if bool(match[1]) == integration:
            exec(compile(match[2], f"{PAGE.name}: {match[2][:40]!r}", "exec"), names)
    return names
