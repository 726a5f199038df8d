"""Values as messages show them."""

from __future__ import annotations

from typing import Any

_LONGEST = 100  # characters


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, the middle of a long one left out."""
    text = repr(value)
    if len(text) <= _LONGEST:
        return text
    half = (_LONGEST - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
