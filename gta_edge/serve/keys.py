"""API keys: what a client must know to be answered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gta_edge.errors import InputError
from gta_edge.support.text import printable
from gta_edge.support.text_files import read_text

__all__ = ["VARIABLE", "read_keys"]

VARIABLE = "GTA_EDGE_API_KEY"
"""Variable of the environment that holds a key."""

_MIN_CHARACTERS = 8


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the keys of a file, one a line, and of the environment; none where neither is given.

    Lines that are empty or begin with ``#`` are none.

    Raises:
        InputError: a file that cannot be read or has no key, or a key that no header could hold or that is too short.
    """
    keys = []
    if file is not None:
        text = read_text(file, InputError, "give a file with one API key on each line")
        keys = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise InputError(f"{printable(str(file))} has no API key", "put one on each line")
    if VARIABLE in environment:
        keys.append(environment[VARIABLE].strip())
    for number, key in enumerate(keys, 1):
        if len(key) < _MIN_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"API key {number} cannot be used",
                f"expected at least {_MIN_CHARACTERS} printable ASCII characters without spaces: openssl rand -hex 24",
            )
    return tuple(key.encode() for key in keys)
