"""JSON files that are not trusted: regular, of a bounded size, and every failure one error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gta_edge.errors import GtaEdgeError
from gta_edge.support.bounded_files import read_bounded
from gta_edge.support.text import brief, one_line, printable

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json"]

MAX_JSON_BYTES = 16 * 2**20
"""Bytes of a JSON file beside a model; real ones stay far below (tokenizer.json is not read as JSON here)."""


def read_json(
    path: Path,
    raises: type[GtaEdgeError],
    remedy: str,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    unique_keys: bool = False,
) -> Any:
    """Return the content of a JSON file; a byte order mark is skipped.

    Args:
        path: the file.
        raises: class of the error.
        remedy: what its message tells to do.
        max_bytes: a larger file is refused before it is read.
        unique_keys: refuse a key that comes twice, instead of taking its last value.

    Raises:
        GtaEdgeError: of class ``raises``: no such file (``__cause__`` is the FileNotFoundError), not a regular one, too
            large, not UTF-8, not JSON, nested too deeply, or with a key that comes twice.
    """
    text = read_bounded(path, raises, remedy, max_bytes=max_bytes)
    try:
        return parse_json(text, unique_keys=unique_keys)
    except ValueError as error:
        raise raises(f"{printable(str(path))}: is not valid JSON ({one_line(error)})", remedy) from error


def parse_json(text: bytes, *, unique_keys: bool = False) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: it is none, is nested too deeply, or has a key twice though ``unique_keys``.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add
        raise ValueError(f"the key {brief(twice)} comes twice")
    return entries
