"""The terminal that all commands write to."""

from rich.console import Console
from rich.text import Text

console = Console()


def say(text: str) -> None:
    """Print a line as it is: a path in it may hold [brackets] and :colons:, which rich would read."""
    console.print(Text(text), highlight=False, soft_wrap=True)
