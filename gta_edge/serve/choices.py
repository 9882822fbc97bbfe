"""The answers to one request of HTTP: scheduler requests, whose events meet in one place of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from gta_edge.serve.scheduler import Event, Request, RequestOptions, Scheduler

__all__ = ["Choices"]

Receive = Callable[[], Awaitable[Any]]


class Choices:
    """Scheduler requests that belong together, and their events as they come; made within an event loop.

    Attributes:
        requests: by the index of their answer.
        expired: whether their time ran out before they were done.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
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
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield indices and events until every answer has ended."""
        pending = len(self.requests)
        while pending:
            index, event = await self._events.get()
            pending -= event.finish_reason is not None
            yield index, event

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
