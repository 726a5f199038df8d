"""The held-out prompts of a run with the original's responses, in the run's folder.

They are written before the first update. So a run that goes on holds out the same prompts, even where their source has
changed meanwhile, and the original does not answer them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config.errors import ConfigError
from common.prompts import Prompt
from deploy.data_fingerprint import of_prompts
from deploy.files import replace_text

_NAME = "held_out.json"


@dataclass(frozen=True)
class HeldOutPrompts:
    """The prompts, and where their responses are kept.

    `teacher` is the fingerprint of the original's files, `max_new_tokens` the limit of its responses: those of another
    original or limit are made again.
    """

    prompts: list[Prompt]
    run_dir: Path
    teacher: str
    max_new_tokens: int

    def responses(self) -> list[np.ndarray] | None:
        """The original's responses, int32, in the order of the prompts; None: not made yet."""
        kept = _read(self.run_dir)
        if kept is None or kept["made_with"] != self._made_with():
            return None
        return [np.array(row["response_ids"], dtype=np.int32) for row in kept["prompts"]]

    def keep(self, responses: Sequence[np.ndarray]) -> None:
        rows = [
            {
                "question": prompt.question,
                "domain": prompt.domain,
                "prompt_ids": prompt.ids.tolist(),
                "response_ids": response.tolist(),
            }
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]
        replace_text(self.run_dir / _NAME, json.dumps({"made_with": self._made_with(), "prompts": rows}) + "\n")

    def _made_with(self) -> dict[str, Any]:
        prompts = of_prompts(self.prompts)
        return {"teacher": self.teacher, "max_new_tokens": self.max_new_tokens, "prompts": prompts}


def kept_prompts(run_dir: Path) -> list[Prompt] | None:
    """The prompts that an earlier part of the run has held out; None: there was none.

    Raises:
        ConfigError: their file cannot be read.
    """
    kept = _read(run_dir)
    if kept is None:
        return None
    return [
        Prompt(i, row["question"], np.array(row["prompt_ids"], dtype=np.int32), row["domain"])
        for i, row in enumerate(kept["prompts"])
    ]


def share_held_out(run_dirs: Sequence[Path], run_dir: Path) -> None:
    """Give a new run what the first of others that has it has held out; it must be trained on the same prompts, in the
    same order. The original's responses are made again where the run asks for others."""
    own, others = run_dir / _NAME, (folder / _NAME for folder in run_dirs)
    if not own.exists() and (found := next((file for file in others if file.is_file()), None)):
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(own, found.read_text())


def _read(run_dir: Path) -> dict[str, Any] | None:
    file = run_dir / _NAME
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ConfigError(
            f"name: {str(file)!r} cannot be read ({error}); remove it, and the prompts at the end of the order are "
            "held out again"
        ) from error
