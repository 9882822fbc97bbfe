"""Being told to end: SIGTERM and SIGHUP unwind the command as Ctrl-C does, so that nothing is left half-written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "Terminated", "exit_status", "handled"]

INTERRUPTED = 128 + signal.SIGINT
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


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
    return 128 + interrupt.number if isinstance(interrupt, Terminated) else INTERRUPTED


@contextmanager
def handled(received: list[int]) -> Iterator[None]:
    """Let the signals raise ``Terminated`` in the body; those that whoever started us has ignored stay ignored.

    Args:
        received: gets the number of the signal that came, if one did: a library may take the exception for Ctrl-C.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:  # a second one must not interrupt the tidying up
            signal.signal(each, signal.SIG_IGN)
        received.append(number)
        raise Terminated(number)

    before = {}
    for number in _SIGNALS if threading.current_thread() is threading.main_thread() else ():  # no other one can
        if signal.getsignal(number) == signal.SIG_DFL:  # ``nohup`` ignores SIGHUP
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
