"""What is wrong with a file of prompts, problems or responses."""

from __future__ import annotations


class PromptError(ValueError):
    """A file is missing, empty or broken, or a row of it cannot be used; the message names the place and the remedy."""
