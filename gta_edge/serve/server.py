"""Runs a service's app: its address, its connections, and its end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Callable
from typing import Any

from gta_edge.errors import InputError
from gta_edge.libraries.optional import optional
from gta_edge.support.text import brief, one_line

__all__ = ["listen", "make_server", "url_of"]

_HEAD_SECONDS = 20.0
"""Time in which a client begins a request and sends its headers."""

_TAKEN_SECONDS = 60
"""Time in which a client takes something of what it is sent."""

_LAST_SECONDS = 2
"""Time in which answers that are ended at the end of the service tell so."""

_BACKLOG = 256
_MAX_CONNECTIONS = 1024


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes one that is free.

    Raises:
        InputError: the address is none, not of this machine, or taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"the service cannot listen at {brief(host)} port {port} ({_reason(error)})",
            "choose another --port or --host",
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux: else a client that takes nothing would hold its answer for ever
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _TAKEN_SECONDS)
    return listening


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None) or 0
    return os.strerror(number) if number > 0 else one_line(getattr(error, "strerror", None) or error)


def url_of(listening: socket.socket) -> str:
    """Return the address that a browser may be given."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  an address to ask, not to listen at
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(
    app: Any, *, drain_seconds: float, ready: Callable[[], None] | None = None, expire: Callable[[], None] | None = None
) -> Any:
    """Return a server of uvicorn; ``run(sockets=[…])`` returns when it has ended.

    SIGTERM and Ctrl-C end it: it takes no more requests and answers those that it has, for some time.

    Args:
        app: the ASGI application.
        drain_seconds: that answers may still take then.
        ready: called when requests are taken.
        expire: called when that time is over, to end the answers that are still made; what they had is sent.

    Raises:
        BackendError: uvicorn is not installed.
    """
    uvicorn = optional("uvicorn", "serve")
    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + _LAST_SECONDS,
    )
    # what it would tell is told by the app in one line, or is that a client has left
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]  # of a library that may not be there
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started and ready is not None:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if expire is not None:
                asyncio.get_running_loop().call_later(drain_seconds, expire)
            await super().shutdown(sockets=sockets)

    return Server(config)


def _protocol() -> Any:
    """Return uvicorn's protocol for HTTP/1.1, with a time in which a client must begin its request.

    uvicorn itself bounds the time between requests only: a client that sends half of its headers would stay for ever.
    """
    base = optional("uvicorn.protocols.http.h11_impl", "serve").H11Protocol

    class Protocol(base):  # type: ignore[misc, valid-type]  # of a library that may not be there
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen: Any = None
            self._look_again()

        def _look_again(self) -> None:
            self.loop.call_later(_HEAD_SECONDS, self._look)

        def _look(self) -> None:
            if self.transport.is_closing():
                return
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._seen == (self.cycle, True):
                self.transport.abort()
                return
            self._seen = self.cycle, idle
            self._look_again()

    return Protocol
