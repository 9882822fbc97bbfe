"""How long work reports that it moves: a plain callable, so that no layer below the commands knows of terminals."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``; a new ``what`` starts a new bar.

A ``total`` of 0 says that the work cannot be counted: it lasts until the next call.
"""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
