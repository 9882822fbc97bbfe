"""One line instead of a silent death, where a file is cut short while it is mapped into memory.

The system ends a process by SIGBUS that reads a mapped page which its file no longer has: libraries map weights and
engines, and what they read in the middle of a step nobody can check before. Python's own handlers of signals run only
after the instruction that failed, which never ends; so this one is called by the system itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

__all__ = ["report_truncated_files"]

_LINE = (
    b"error: a file in use was cut short or changed on its disk; copy the model anew, and leave it as it is in use\n"
)
_kept: list[Any] = []  # the system calls it as long as the process lives


def report_truncated_files() -> None:
    """Let the process say so in one line on stderr and end with status 1 when it meets such a page.

    For a program's main function; it does nothing on systems without that signal.
    """
    if _kept or not hasattr(signal, "SIGBUS"):
        return

    def end(number: int) -> None:
        os.write(2, _LINE)
        os._exit(1)  # what failed would be tried again otherwise

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(int(signal.SIGBUS), ctypes.cast(handler, ctypes.c_void_p))
    _kept.append(handler)
