"""A number that the GPU memory of a role grows with, halved when memory runs out, so that the work is tried again.

Nothing is lost by that: what was under way is computed again from its beginning, in smaller pieces.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch


@dataclass
class MemoryBudget:
    """`value` of the config field `name`, and the `notes` that somebody should hear; `least` is its smallest value."""

    name: str
    value: int
    least: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def can_halve(self) -> bool:
        return self.value > self.least

    def half(self, most: int | None = None) -> int:
        """Half of the value, or of `most` if that is what was in use."""
        return max(min(self.value, most or self.value) // 2, self.least)

    def halve(self, most: int | None = None) -> None:
        """From now on `half`. Call it outside of the handler of the exception, which still holds the memory."""
        before = self.value
        self.value = self.half(most)
        self.notes.append(
            f"GPU memory ran out: {self.name} is {self.value} instead of {before} from now on, and the work was tried "
            f"again; set {self.name} to {self.value}"
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take_notes(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes
