"""Text of others on a terminal: nothing in it moves the cursor, sets colours or counts as markup.

This module must not decide what is printed.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from recovery.bounded_files import text_of

LINE_CHARACTERS_MAX = 2000
_ERROR_LINES_MAX = 50


def shown(value: object, chars_max: int = LINE_CHARACTERS_MAX) -> str:
    """`value` as one line that can be printed, whoever wrote it: control characters as codes."""
    return text_of(value, chars_max)


def print_plain(console: Console, line: object, style: str | None = None) -> None:
    """Print one line as it is: no markup, no highlighting, not wrapped."""
    console.print(shown(line), style=style, highlight=False, markup=False, soft_wrap=True)


def print_error(console: Console, error: Exception) -> None:
    """Print an error by its name and message, which may quote a file, or a path, of anybody."""
    first, *others = str(error).splitlines()[:_ERROR_LINES_MAX] or [""]
    named = Text.assemble((type(error).__name__, "red"), f": {shown(first)}")
    console.print(named, highlight=False, soft_wrap=True)
    for line in others:
        print_plain(console, line)
