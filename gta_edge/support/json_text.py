"""A result as JSON text: valid on every stream, whatever is in it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["json_text", "plain"]


def json_text(content: Mapping[str, Any], encoding: str | None = None) -> str:
    r"""Return a document in one line of JSON.

    Args:
        content: the document; see ``plain``.
        encoding: of the stream that it goes to. What that cannot say, half of a surrogate pair in any (a byte of a
            file's name that is not UTF-8), becomes ``\uXXXX``; None for ASCII.

    Raises:
        TypeError: a value that JSON has nothing for.
    """
    document = plain(content)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(document, ensure_ascii=True, allow_nan=False)
    return text


def plain(value: Any) -> Any:
    """Return a value as JSON has it: infinity and NaN are null, NumPy's values numbers and lists, paths and keys text.

    Raises:
        TypeError: a value that JSON has nothing for.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)  # an IntEnum too
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if hasattr(value, "tolist"):  # NumPy's, without importing it
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _key(key: Any) -> str:
    found = plain(key)
    return found if isinstance(found, str) else json.dumps(found)
