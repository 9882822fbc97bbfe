"""Chat templates: the text that asks a model for its answer, made by a program that came with the model.

Rendering happens in a process of its own (``template_worker``), since nothing in this one could bound it: one
expression can take all memory or hours. Bounded are, for each rendering, the computing time and the memory of that
process and the size of its text; what leaves a bound ends the process and is an error here. It has none of this
process's files, opens and starts none, and ends with it.

The process is started with the first rendering, which takes a tenth of a second, and kept for the next.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gta_edge.errors import BackendError, InputError
from gta_edge.formats.template_worker import MAX_CHARACTERS
from gta_edge.support.text import brief, one_line

__all__ = ["CPU_SECONDS", "ChatTemplate"]

CPU_SECONDS = 2.0
"""Computing time of a rendering; the templates in use take some milliseconds."""

_WALL_SECONDS = 120  # and however busy the machine is
_MAX_SOURCE = 2**20  # characters; the longest in use have some 30,000
_MAX_ANSWER = 12 * MAX_CHARACTERS + 2**16  # bytes: a character may be written as two escapes
_WORKER = Path(__file__).with_name("template_worker.py")
_ENVIRONMENT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")  # what Python, its libraries and dates need


class ChatTemplate:
    """One chat template.

    Args:
        source: in jinja.
        cpu_seconds: computing time that a rendering may take.
    """

    def __init__(self, source: str, *, cpu_seconds: float = CPU_SECONDS) -> None:
        self._source = source
        self._cpu_seconds = cpu_seconds
        self._worker: _Worker | None = None
        self._turn = threading.Lock()

    @property
    def source(self) -> str:
        """What it is, in jinja."""
        return self._source

    def check(self, variables: Mapping[str, Any]) -> str | None:
        """Render one message of the user, as text or, for templates that take no text, in parts.

        Returns:
            Why the template refuses it with ``raise_exception``, since it may be meant for other chats; else None.

        Raises:
            InputError: it is wrong or too long, fails otherwise, or takes too much.
        """
        try:
            self.render([{"role": "user", "content": "Hi"}], variables)
        except _RefusedError as error:
            return error.reason
        except InputError:
            with suppress(InputError):
                self.render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], variables)
                return None
            raise
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Return the text for ``messages``, with the special tokens by name in ``variables``.

        Content in parts is given to a template that takes such; to another one as their texts, a line each.

        Raises:
            InputError: messages of another form; a template that is wrong, refuses them, or takes too much.
            BackendError: no process can be started.
        """
        return self._ask(_checked(messages), variables)

    def _ask(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        if len(self._source) > _MAX_SOURCE:
            raise _failed(f"it has {len(self._source)} characters, more than {_MAX_SOURCE}")
        request = {
            "template": self._source,
            "variables": dict(variables),
            "messages": messages,
            "seconds": self._cpu_seconds,
        }
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"the messages hold what JSON cannot say ({one_line(error)})", "give texts, numbers, lists and objects"
            ) from error
        with self._turn:
            if self._worker is None or not self._worker.usable:
                self._worker = _Worker()
            answer = self._worker.ask(line)
        if "text" in answer:
            return str(answer["text"])
        reason = answer.get("error")
        if answer.get("signal") == signal.SIGPROF:
            reason = f"it takes more than {self._cpu_seconds:g} s of computing time"
        if "refused" in answer:
            raise _RefusedError(str(reason))
        raise _failed(str(reason or "the process that renders it ended over it"))


def _failed(reason: str) -> InputError:
    return InputError(f"the chat template failed: {one_line(reason)}", "check it and the messages")


class _RefusedError(InputError):
    """The template called ``raise_exception``."""

    def __init__(self, reason: str) -> None:
        super().__init__(str(_failed(reason)))
        self.reason = one_line(reason)


def _checked(messages: object) -> list[dict[str, Any]]:
    """Return messages as templates take them."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InputError(f"the messages are {brief(messages)}", "expected a list of {'role': …, 'content': …}")
    return [_checked_message(message) for message in messages]


def _checked_message(message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"a message is {brief(message)}", "expected {'role': …, 'content': …} with a role of text")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise InputError(f"a message has the tool_calls {brief(calls)}", "expected a list of objects")
    content = message.get("content")
    if isinstance(content, (list, tuple)) and content:
        return {**message, "content": [_checked_part(part) for part in content]}
    if isinstance(content, str) or (content is None and calls):
        return dict(message)
    raise InputError(
        f"a message is {brief(message)}",
        "expected {'role': …, 'content': …} with a content of text, or of parts "
        "{'type': 'text', 'text': …}, or none beside tool_calls",
    )


def _checked_part(part: object) -> dict[str, Any]:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return dict(part)
    raise InputError(
        f"a part of a message is {brief(part)}", "expected {'type': 'text', 'text': …}: the model has no other"
    )


class _Worker:
    """The process that renders; ``usable`` until it ended or something in it went wrong."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        paths = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
        try:
            self._process = subprocess.Popen(
                [sys.executable or "python3", "-I", str(_WORKER), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us alone
            )
        except OSError as error:
            raise BackendError(
                f"the process that renders chat templates cannot be started ({one_line(error)})",
                "close other programs, or give the prompt as plain text",
            ) from error
        self._owner = os.getpid()
        self._failed = False
        self._finalizer = weakref.finalize(self, _end, self._process, self._owner)
        if self._read() is None:
            raise BackendError(
                f"the process that renders chat templates ended at once ({sys.executable} {_WORKER})",
                "check that this Python can import jinja2, or give the prompt as plain text",
            )

    @property
    def usable(self) -> bool:
        # a process that was forked from ours shares the pipes, and takes a worker of its own
        return not self._failed and self._owner == os.getpid() and self._process.poll() is None

    def ask(self, line: bytes) -> dict[str, Any]:
        """Return the answer to a request; where the process ended over it, the ``signal`` that ended it."""
        answer = None
        try:
            pending = memoryview(line)
            while pending:
                pending = pending[_pipe(self._process.stdin).write(pending) or 0 :]
            answer = self._read()
        except BrokenPipeError:
            pass
        finally:
            # also where Ctrl-C comes between request and answer: the answer must not be taken for the next one's
            self._failed = answer is None or "limit" in answer
            if self._failed:
                self._finalizer()
        return answer or {"signal": -self._process.returncode}

    def _read(self) -> dict[str, Any] | None:
        """Return one answer; None where none comes, or too late, or one that is too long."""
        descriptor, deadline = _pipe(self._process.stdout).fileno(), time.monotonic() + _WALL_SECONDS
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        received = bytearray()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or len(received) > _MAX_ANSWER or not ready.poll(1000 * left):
                return None
            block = os.read(descriptor, 2**20)
            if not block:
                return None
            received += block
        answer: dict[str, Any] = json.loads(received)
        return answer


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # all were asked for
    return stream


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker and free its pipes; in a process that was forked from its owner, leave it alone."""
    for stream in (process.stdin, process.stdout):
        _pipe(stream).close()
    if os.getpid() == owner:
        if process.poll() is None:
            process.kill()
        process.wait()
