"""Names that a person chooses from a few: what to say of one that is none of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from gta_edge.support.text import brief

__all__ = ["unknown"]

_MAX_COMPARED = 40  # characters: no name is longer, and comparing takes the square of it


def unknown(message: str, found: object, allowed: Iterable[str]) -> tuple[str, str]:
    """Return the problem and the remedy of a name that is not among those allowed.

    Args:
        message: problem and remedy with ``"; "`` between, ``{}`` in each for what was found and for what is allowed.
        found: as it was given, however long.
        allowed: the names.

    Returns:
        Both, the remedy with a hint where only the case, or little more, is wrong.
    """
    names = list(allowed)
    problem, _, remedy = message.partition("; ")
    near = _near(found, names) if isinstance(found, str) else None
    hint = f" (did you mean {near}?)" if near else ""
    return problem.format(brief(found)), remedy.format(", ".join(names)) + hint


def _near(found: str, names: list[str]) -> str | None:
    if len(found) > _MAX_COMPARED:
        return None
    by_lower = {name.lower(): name for name in names}
    near = get_close_matches(found.strip().lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[near[0]] if near else None
