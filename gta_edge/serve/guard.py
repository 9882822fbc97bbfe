"""Who may ask what, before anything is read: an ASGI middleware, which also turns errors into responses.

Without keys a service on this machine is open to every program on it, but not to the web pages that its browsers show:
those can send requests to any address, and make a name of theirs resolve to this machine (DNS rebinding). Such requests
tell of another origin or another host.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gta_edge.serve.request_error import RequestError, as_request_error, error_body
from gta_edge.serve.settings import Settings
from gta_edge.support.text import brief, one_line

__all__ = ["Guard", "read_body"]

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health"})
"""What needs no key: the page, which asks for one, and whether the service runs."""

_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_DRAINED_BYTES = 64 * 2**20
_DRAIN_SECONDS = 10.0


class Guard:
    """Checks host, origin and key of every request, and how many there are at a time.

    Args:
        app: what answers those that pass.
        settings: of the service.
        answered: told of every response's path and status.
    """

    def __init__(self, app: Any, settings: Settings, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._settings = settings
        self._answered = answered
        self._active = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = received = False

        async def noting_start(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                self._answered(scope["path"], message["status"])
            await send(message)

        async def noting_end() -> Message:
            nonlocal received
            message = await receive()
            received = not message.get("more_body", False)  # false when the client has left, too
            return message

        self._active += 1
        try:
            self._check(scope)
            await self._app(scope, noting_end, noting_start)
        except Exception as error:  # whatever it is, it must end with this request
            told = as_request_error(error)
            if told.status >= 500:
                _log.error(
                    "%s %s: %s: %s", scope["method"], brief(scope["path"]), type(error).__name__, one_line(error)
                )
            if not started:  # else nothing but the end of the connection can tell
                if not received and told.status != 408:  # a client may read nothing before it has sent all
                    received = await _drained(receive)
                await _refuse(told, noting_start, last=not received)
        finally:
            self._active -= 1

    def _check(self, scope: Message) -> None:
        headers = {name: value for name, value in scope["headers"] if name in (b"host", b"origin", b"authorization")}
        if scope["path"] not in OPEN_PATHS and self._settings.api_keys:
            self._check_key(headers.get(b"authorization", b""))
        if not self._settings.api_keys:
            self._check_source(headers)
        if self._active > self._settings.max_requests:
            raise RequestError(
                429,
                f"{self._settings.max_requests} requests are being answered",
                "ask again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, given = authorization.partition(b" ")
        fits = False
        for key in self._settings.api_keys:  # all of them, so that the time tells nothing
            fits |= hmac.compare_digest(key, given.strip())
        if scheme.lower() != b"bearer" or not fits:
            raise RequestError(
                401,
                "the API key is missing or wrong",
                "send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_source(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise RequestError(403, "the request comes from a page of another origin", "start the service with a key")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._settings.local and host and name not in _LOCAL_HOSTS:
            raise RequestError(
                403, f"the request is for the host {brief(host)}", "ask 127.0.0.1, or start the service with a key"
            )


async def read_body(receive: Receive, settings: Settings) -> bytes:
    """Return a request's body.

    Raises:
        RequestError: it is too long, is not all there in time, or its client has left.
    """
    parts: list[bytes] = []
    try:
        size = await asyncio.wait_for(_read(receive, parts, settings.max_body_bytes), settings.body_seconds)
    except asyncio.TimeoutError:
        raise RequestError(
            408, f"the body was not received within {settings.body_seconds:g} s", "send it again"
        ) from None
    if size > settings.max_body_bytes:
        raise RequestError(
            413, f"the body has more than {settings.max_body_bytes} bytes", "send less", code="body_too_large"
        )
    return b"".join(parts)


async def _read(receive: Receive, parts: list[bytes], limit: int) -> int:
    """Receive a body into ``parts``, up to a limit in bytes, and return its size; of a longer one a part of it."""
    size, more = 0, True
    while more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "the client left before its request was complete")
        body = message.get("body", b"")
        parts.append(body)
        size += len(body)
        more = message.get("more_body", False)
    return size


async def _refuse(error: RequestError, send: Send, *, last: bool) -> None:
    """Send an error as the response, as the ``last`` of its connection where what follows is a rest of this request."""
    body = json.dumps(error_body(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    if last:
        headers["connection"] = "close"
    listed = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


async def _drained(receive: Receive) -> bool:
    """Take what is left of a request's body, within bounds, and leave it; tell whether that was all."""

    async def take() -> bool:
        taken, more = 0, True
        while more and taken <= _DRAINED_BYTES:
            message = await receive()
            taken += len(message.get("body", b""))
            more = message.get("more_body", False)
        return not more

    try:
        return await asyncio.wait_for(take(), _DRAIN_SECONDS)
    except asyncio.TimeoutError:
        return False
