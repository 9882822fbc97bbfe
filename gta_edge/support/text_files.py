"""Text files that a user names, or that lie beside a model: regular, of a bounded size, UTF-8, one error."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from gta_edge.errors import GtaEdgeError, InputError
from gta_edge.support.bounded_files import read_bounded
from gta_edge.support.text import one_line, printable

__all__ = ["MAX_TEXT_BYTES", "STANDARD_INPUT", "read_text", "read_text_or_stdin"]

MAX_TEXT_BYTES = 256 * 2**20
"""Bytes of a text that is read as a whole; its tokens take several times as much memory."""

STANDARD_INPUT = "-"

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(
    path: Path,
    raises: type[GtaEdgeError] = InputError,
    remedy: str = "give a text file in UTF-8",
    *,
    max_bytes: int = MAX_TEXT_BYTES,
    pipes: bool = False,
) -> str:
    """Return the content of a text file in UTF-8, without a byte order mark.

    Args:
        path: the file.
        raises: class of the error.
        remedy: what its message tells to do.
        max_bytes: a larger file is refused before it is read.
        pipes: take a pipe too, as ``<(command)`` of a shell is one, and wait for its end.

    Raises:
        GtaEdgeError: of class ``raises``: no such file (``__cause__`` is the FileNotFoundError), not a regular one, too
            large, or not UTF-8.
    """
    content = read_bounded(path, raises, remedy, max_bytes=max_bytes, pipes=pipes)
    return _decoded(content, printable(str(path)), raises, remedy)


def read_text_or_stdin(path: Path) -> str:
    """Return a user's text as ``read_text`` does; ``-`` is standard input, up to its end.

    Raises:
        InputError: as there, or there is no standard input.
    """
    if str(path) != STANDARD_INPUT:
        return read_text(path, remedy="give a text file in UTF-8, or - to read standard input", pipes=True)
    remedy = "pipe a text in UTF-8 into it"
    if sys.stdin is None:  # closed by whoever started us
        raise InputError("standard input is closed", remedy)
    try:
        content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: closed since
        raise InputError(f"standard input cannot be read ({one_line(error)})", remedy) from error
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"standard input: has more than {MAX_TEXT_BYTES} bytes", remedy)
    return _decoded(content, "standard input", InputError, remedy)


def _decoded(content: bytes, name: str, raises: type[GtaEdgeError], remedy: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "UTF-16 text" if content[:2] in _UTF_16 else f"not UTF-8 text (byte {error.start})"
        raise raises(f"{name}: is {found}", remedy) from error
