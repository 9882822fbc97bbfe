"""Being told to end, by Ctrl-C (SIGINT), SIGTERM or SIGHUP: the command unwinds, and nothing is left half-written.

Python raises an exception for it wherever the program happens to be, and so not all of them arrive: one that comes in a
finalizer is printed and lost, and libraries turn one into an error of their own (an import in C into ImportError).
What came is therefore noted as well, and decides the exit status whatever became of the exception.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Terminated", "answered", "exit_status", "handled", "received_status"]

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_AFTER_HOOK_S = 0.01
_received: list[int] = []  # one command a process


class Terminated(KeyboardInterrupt):
    """The process was told to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status of a command that was interrupted: 130, or for a signal as a shell would report it."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


def received_status() -> int | None:
    """Return the exit status for the first signal that came, None where none has."""
    return 128 + _received[0] if _received else None


def answered() -> None:
    """Forget a Ctrl-C that was meant for something else than the command, and has ended that."""
    _received.clear()


@contextmanager
def handled() -> Iterator[None]:
    """Let the signals raise ``Terminated``, or KeyboardInterrupt, in the body.

    Those that whoever started us has ignored stay ignored. After the body Ctrl-C ends the process at once and in
    silence: what then remains is Python's own end, which would print a traceback.
    """
    _received.clear()

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:  # a second one must not interrupt the tidying up
            signal.signal(each, signal.SIG_IGN)
        _received.append(number)
        raise Terminated(number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        raise KeyboardInterrupt

    before = {}
    interruptible = False
    if threading.current_thread() is threading.main_thread():  # no other one can
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:  # ``nohup`` ignores SIGHUP
                before[number] = signal.signal(number, end)
        interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if interruptible:  # a shell lets what it starts in the background ignore it
            signal.signal(signal.SIGINT, interrupt)
    unraisable, again = sys.unraisablehook, (threading.get_ident(), signal.SIGINT)

    def raise_again(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            threading.Timer(_AFTER_HOOK_S, signal.pthread_kill, again).start()  # raised here, it would be lost again
        else:
            unraisable(lost)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
