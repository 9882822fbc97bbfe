"""Sends answers as they come: as events (server-sent events, of the HTML standard), or as one document at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from gta_edge.serve.answers import Answers, best, usage
from gta_edge.serve.choices import Choices
from gta_edge.serve.metrics import Metrics
from gta_edge.serve.request_error import RequestError, as_request_error, error_body
from gta_edge.serve.scheduler import Event
from gta_edge.serve.schema import Options

__all__ = ["Reply"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"))
_DOCUMENT = ((b"content-type", b"application/json"),)


class Reply:
    """An ASGI response that answers with what the model says.

    Args:
        choices: the answers to come.
        answers: their form.
        options: which of them are given, and whether events are sent as they come.
        seconds: that the answers may take.
        metrics: told of their times.
        started: when the request came, by ``time.perf_counter``.
    """

    def __init__(
        self,
        choices: Choices,
        answers: Answers,
        options: Options,
        *,
        seconds: float,
        metrics: Metrics,
        started: float,
    ) -> None:
        self._choices, self._answers, self._options = choices, answers, options
        self._seconds, self._metrics, self._started = seconds, metrics, started
        self._first: dict[int, float] = {}  # when an answer's first token came

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Send the response; it ends early when the client leaves."""
        async with self._choices.bounded(receive, self._seconds):
            await (self._stream(send) if self._options.stream else self._document(send))

    async def _document(self, send: Send) -> None:
        events: list[list[Event]] = [[] for _ in self._choices.requests]
        async for arrived in self._choices.events():
            for index, event in arrived:
                self._measure(index, event)
                events[index].append(event)
        self._raise_if_failed(events)
        body = _json(self._answers.whole(best(events, self._options), self._usage()))
        await send(_start(200, (*_DOCUMENT, (b"content-length", str(len(body)).encode()))))
        await send({"type": "http.response.body", "body": body})

    def _raise_if_failed(self, events: list[list[Event]]) -> None:
        for each in events:
            if each[-1].error is not None:
                raise each[-1].error
        if self._choices.expired and not self._first:
            raise RequestError(
                503,
                f"no token was generated within {self._seconds:g} s",
                "ask again later",
                code="timeout",
                headers={"Retry-After": "10"},
            )

    async def _stream(self, send: Send) -> None:
        await send(_start(200, _STREAM))
        failed = False
        async for arrived in self._choices.events():
            told = []
            for index, event in arrived:
                self._measure(index, event)
                failed = event.error is not None
                if event.error is not None:
                    told.append(_json(error_body(as_request_error(event.error))))
                    break
                if (chunk := self._answers.chunk(index, event)) is not None:
                    told.append(_json(self._with_usage(chunk)))
            if told:
                await send(_events(told))
            if failed:
                break
        if not failed:
            used = [_json(self._answers.last_chunk(self._usage()))] if self._options.include_usage else []
            await send(_events([*used, b"[DONE]"]))
        await send({"type": "http.response.body", "body": b""})

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Return a chunk as it is where its stream ends with the usage: with the same key, and nothing in it."""
        return {**chunk, "usage": None} if self._options.include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self._choices.requests, self._options.best_of)

    def _measure(self, index: int, event: Event) -> None:
        now = time.perf_counter()
        if event.error is None and index not in self._first and (event.ids or event.finish_reason == "stop"):
            self._first[index] = now
            self._metrics.first_token(now - self._started)
        if event.finish_reason and index in self._first:
            tokens = self._choices.requests[index].completion_tokens
            self._metrics.further_tokens(tokens - 1, now - self._first[index])


def _start(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def _events(data: Sequence[bytes]) -> Message:
    body = b"".join(b"data: " + each + b"\n\n" for each in data)
    return {"type": "http.response.body", "body": body, "more_body": True}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
