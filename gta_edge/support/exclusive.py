"""One call at a time on an object that cannot take two."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import cast

from gta_edge.errors import InputError

__all__ = ["Exclusive"]


class Exclusive:
    """Lets one call in at a time: a second one is an error instead of a wrong answer.

    A call that Ctrl-C ends has left it, wherever the exception came: also between two instructions of entering and of
    leaving, which a generator under ``contextmanager`` would not notice.

    Args:
        what: the object, as the message names it.
        remedy: what the message tells to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self._what = what
        self._remedy = remedy
        self._lock = threading.RLock()  # it knows its owner; nobody enters it twice

    @property
    def mine(self) -> bool:
        """Whether this thread is in a call."""
        # what threading.Condition asks, too; an owner noted beside the lock could be wrong after Ctrl-C
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # typeshed leaves private names out

    def held(self, *, wait: bool = False) -> AbstractContextManager[None]:
        """Return what holds it for the body of a ``with``.

        Args:
            wait: wait for a call of another thread to end, instead of refusing.

        Raises:
            InputError: by ``with``: another thread is in a call, or this one is (a signal handler, for instance).
        """
        # cast: its __exit__ is a property, which the protocol does not know
        return cast("AbstractContextManager[None]", _Held(self, wait))

    def _enter(self, wait: bool) -> None:
        if self.mine:
            raise InputError(f"{self._what} is called from within one of its own calls", self._remedy)
        try:
            if self._lock.acquire(blocking=wait):
                return
        except BaseException:  # Ctrl-C may come when it has been acquired
            self._leave()
            raise
        raise InputError(f"{self._what} is in use by another thread", self._remedy)

    def _leave(self) -> None:
        if self.mine:
            self._lock.release()


class _Held:
    """Holds it from ``__enter__`` to ``__exit__``."""

    def __init__(self, exclusive: Exclusive, wait: bool) -> None:
        self._exclusive = exclusive
        self._wait = wait

    def __enter__(self) -> None:
        self._exclusive._enter(self._wait)

    @property
    def __exit__(
        self,
    ) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
        # The lock's own, which is in C: nothing can interrupt it before it has released the lock, as a function in
        # Python can be as it begins.
        return self._exclusive._lock.__exit__
