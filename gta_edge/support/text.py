"""Text from files and libraries, as one line of a message can hold it.

A message may quote what came from an untrusted file: of any length, with line breaks, with terminal escapes.
"""

from __future__ import annotations

__all__ = ["brief", "one_line", "printable", "printable_text"]

MAX_QUOTED = 120
"""Characters of a quoted value."""
MAX_LINE = 400
"""Characters of what a library said."""


def printable(text: str) -> str:
    """Return ``text`` with everything escaped that a terminal would obey: control characters, line breaks, bidi marks.

    Printable characters of any script stay as they are; so does the space, and no other white space.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_text(text: str) -> str:
    """Return a model's text as a terminal may have it: control characters escaped, but for line ends and tabs."""
    return "".join(c if c in "\n\t" or ord(c) > 0x9F else printable(c) for c in text)


def brief(value: object, limit: int = MAX_QUOTED) -> str:
    """Return ``repr(value)`` as a message can quote it: printable, at most about ``limit`` characters.

    Containers and texts are cut before they are formatted, so that a value of any size costs nothing.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a whole number of more than 20 digits"
    if isinstance(value, (str, bytes)) and len(value) > limit:
        quoted = printable(repr(value[:limit]))[: limit + 2]  # escapes are longer than what they stand for
        return f"{quoted}… ({len(value)} {'characters' if isinstance(value, str) else 'bytes'})"
    if isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > limit // 4:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    if isinstance(value, (list, tuple)):
        opening, closing = "[]" if isinstance(value, list) else "()"
        return _cut(f"{opening}{', '.join(brief(entry, limit // 2) for entry in value)}{closing}", limit)
    if isinstance(value, dict):
        entries = (f"{brief(key, limit // 2)}: {brief(entry, limit // 2)}" for key, entry in value.items())
        return _cut(f"{{{', '.join(entries)}}}", limit)
    return _cut(printable(repr(value)), limit)


def one_line(text: object, limit: int = MAX_LINE) -> str:
    """Return ``str(text)`` in one printable line of about ``limit`` characters at most; if empty, the type's name."""
    said = str(text)
    line = printable(" ".join(said[: 4 * limit].split())) or type(text).__name__
    return _cut(line, limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
