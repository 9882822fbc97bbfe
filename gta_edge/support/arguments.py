"""Arguments of public functions that are of a type that makes no sense: one line says so, not some TypeError."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path

from gta_edge.errors import InputError
from gta_edge.support.text import brief

__all__ = ["path_argument", "whole_argument"]


def path_argument(value: object, name: str) -> Path:
    """Return a path, as a ``Path``.

    Args:
        value: as it was given.
        name: what it is, for the message: ``the bundle``.

    Raises:
        InputError: it is neither text nor an object that stands for a path in text.
    """
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str):
        raise InputError(f"{name} is {brief(value)}", "expected a path")
    return Path(given)


def whole_argument(value: object, name: str) -> int:
    """Return a whole number, of Python or of NumPy.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {brief(value)}", "expected a whole number")
    return int(value)
