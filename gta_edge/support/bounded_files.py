"""Files that are not trusted, read as a whole: regular, of a bounded size, and every failure one error of ours."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from gta_edge.errors import GtaEdgeError
from gta_edge.support.text import one_line, printable

__all__ = ["read_bounded"]


def read_bounded(path: Path, raises: type[GtaEdgeError], remedy: str, *, max_bytes: int, pipes: bool = False) -> bytes:
    """Return the content of a file.

    Args:
        path: the file.
        raises: class of the error.
        remedy: what its message tells to do.
        max_bytes: a larger file is refused before it is read.
        pipes: take a pipe too, as ``<(command)`` of a shell is one, and wait for its end.

    Raises:
        GtaEdgeError: of class ``raises``: no such file (``__cause__`` is the FileNotFoundError), not a regular one, or
            too large.
    """
    name = printable(str(path))
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (pipes or stat.S_ISREG(info.st_mode)):  # reading a pipe would wait for ever
            raise raises(f"{name}: is not a regular file", remedy)
        if info.st_size > max_bytes:
            raise raises(f"{name}: has {info.st_size} bytes; expected at most {max_bytes}", remedy)
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)  # and not all of it: it may grow meanwhile
    except OSError as error:
        raise raises(f"{name}: cannot be read ({error.strerror or one_line(error)})", remedy) from error
    except ValueError as error:  # a NUL in the path
        raise raises(f"{name}: is no path ({one_line(error)})", remedy) from error
    if len(content) > max_bytes:
        raise raises(f"{name}: has more than {max_bytes} bytes", remedy)
    return content
