"""The answers to one request of HTTP: scheduler requests, whose events meet in one place of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from gta_edge.serve.scheduler import Event, Request, RequestOptions, Scheduler

__all__ = ["Choices", "Mailbox"]

Receive = Callable[[], Awaitable[Any]]


class Mailbox:
    """Calls from other threads to an event loop, which is woken once for all that come before it has got to them.

    Each time it is woken it takes the interpreter's lock from the thread that runs the model.

    Attributes:
        loop: makes the calls.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, call: Callable[[], None]) -> None:
        """Let the loop make a call; from any thread."""
        self._calls.append(call)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before the calls are looked at: what is posted from now on wakes it again
        while self._calls:
            self._calls.popleft()()


class Choices:
    """Scheduler requests that belong together, and their events as they come; made within an event loop.

    Args:
        scheduler: runs them.
        mailbox: of the event loop.

    Attributes:
        requests: by the index of their answer.
        expired: whether their time ran out before they were done.
    """

    def __init__(self, scheduler: Scheduler, mailbox: Mailbox) -> None:
        self._scheduler, self._mailbox = scheduler, mailbox
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.requests: list[Request] = []
        self.expired = False

    def submit(self, ids: Sequence[int], options: RequestOptions) -> None:
        """Ask for one more answer.

        Raises:
            GtaEdgeError: it is refused; those that were asked for before are cancelled.
        """
        put = partial(self._put, len(self.requests))
        try:
            self.requests.append(self._scheduler.submit(ids, options, on_event=put))
        except BaseException:
            self.cancel()
            raise

    def _put(self, index: int, event: Event) -> None:
        """Take an event in the scheduler's thread."""
        self._mailbox.post(partial(self._events.put_nowait, (index, event)))

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield indices and events, all that have come at a time, until every answer has ended."""
        pending = len(self.requests)
        while pending:
            found = [await self._events.get()]
            while not self._events.empty():
                found.append(self._events.get_nowait())
            pending -= sum(event.finish_reason is not None for _, event in found)
            yield found

    def cancel(self) -> None:
        """End what has not ended: the slots are free after the model's next step."""
        for request in self.requests:
            request.cancel()

    def expire(self) -> None:
        """End what has not ended, since its time is over."""
        self.expired = True
        self.cancel()

    @asynccontextmanager
    async def bounded(self, receive: Receive, seconds: float) -> AsyncIterator[None]:
        """End all answers when the client leaves, when their time is over, and with the body.

        Args:
            receive: of ASGI; the request's body has been received.
            seconds: that the answers may take.
        """
        watching = asyncio.create_task(self._watch(receive))
        timer = self._loop.call_later(seconds, self.expire)
        try:
            yield
        finally:
            timer.cancel()
            watching.cancel()
            self.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()
