"""One call at a time on an object that cannot take two."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gta_edge.errors import InputError

__all__ = ["Exclusive"]


class Exclusive:
    """Lets one call in at a time: a second one is an error instead of a wrong answer.

    Args:
        what: the object, as the message names it.
        remedy: what the message tells to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self._what = what
        self._remedy = remedy
        self._lock = threading.Lock()
        self._thread: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread is in a call."""
        return self._thread == threading.get_ident()

    @contextmanager
    def held(self, *, wait: bool = False) -> Iterator[None]:
        """Hold it for the body.

        Args:
            wait: wait for a call of another thread to end, instead of refusing.

        Raises:
            InputError: another thread is in a call, or this one is (a signal handler, for instance).
        """
        if self.mine:
            raise InputError(f"{self._what} is called from within one of its own calls", self._remedy)
        if not self._lock.acquire(blocking=wait):
            raise InputError(f"{self._what} is in use by another thread", self._remedy)
        try:
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = None
            self._lock.release()
