"""Renders chat templates, in a process of its own that ``chat_template`` starts: a script, not a module to import.

A template is code of whoever made the model. jinja2's sandbox keeps it from Python's objects; this process keeps it
from the machine: it may take some computing time for each request and some memory, opens no files and starts nothing.

Each line on stdin is a request, each line on stdout its answer, both JSON. It ends when stdin does.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

MEMORY_BYTES = 512 * 2**20
"""Address space of the process, Python's own included."""

MAX_CHARACTERS = 16 * 2**20
"""Of a rendered text."""

_MESSAGE = 1000  # characters of a reason
_WARM_UP = ("{{ strftime_now('%Y') }}{{ messages | tojson | pprint }}", "{% if %}", "{{ 1 / 0 }}")
"""Sources over which everything is loaded, before no more files may be opened."""


class _LimitError(Exception):
    """The template asks for more than it may have."""


class _RefusedError(Exception):
    """The template refuses the messages."""


class _Parts(list):  # type: ignore[type-arg]  # of whatever JSON holds
    """Content in parts, for templates that walk through them; as text it would be Python's notation of a list."""

    def __str__(self) -> str:
        raise TypeError("the content has parts, and the template takes text")


class _Nothing:
    """Content that is null, for templates that ask ``is none``; as text it would be the word None."""

    __hash__ = None  # type: ignore[assignment]  # equal to None

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Nothing)

    def __str__(self) -> str:
        raise TypeError("the content is null, and the template takes text")


def main() -> None:
    """Answer requests until there are no more."""
    sys.path += sys.argv[1:]  # where jinja2 lies
    templates = _Templates()
    for source in _WARM_UP:
        with suppress(Exception):  # that of the source that is wrong
            templates.render(source, {}, [])
    _confine()
    _write({})  # ready
    for line in sys.stdin:
        answer = _answer(templates, json.loads(line))
        _write(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if "limit" in answer:
            return  # a process that had no memory left is not used again


def _write(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _confine() -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,  # those that are open stay so
        resource.RLIMIT_NPROC: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _answer(templates: _Templates, request: dict[str, Any]) -> dict[str, str]:
    # in computing time, so that a busy machine fails nothing; the signal ends the process, and no code can catch it
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        source, variables, messages = request["template"], request["variables"], request["messages"]
        return {"text": _first_that_works(templates, source, variables, messages)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory", "limit": "memory"}
    except _LimitError as error:
        return {"error": str(error), "limit": "size"}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except _RefusedError as error:
        return {"error": str(error)[:_MESSAGE] or "it gives no reason", "refused": "yes"}
    except Exception as error:  # whatever a template makes of its data
        return {"error": str(error)[:_MESSAGE] or type(error).__name__}


def _first_that_works(templates: _Templates, source: str, variables: dict[str, Any], messages: list[Any]) -> str:
    """Render content in parts, and content that is null or missing, in the first form that the template takes."""
    forms = _FORMS if any(not isinstance(message.get("content"), str) for message in messages) else _FORMS[:1]
    for form in forms[:-1]:
        try:
            return templates.render(source, variables, [form(message) for message in messages])
        except (MemoryError, RecursionError, _LimitError):
            raise
        except Exception:  # noqa: S112  the last form's error is raised
            continue
    return templates.render(source, variables, [forms[-1](message) for message in messages])


def _as_it_is(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content", "")
    if isinstance(content, list):
        return {**message, "content": _Parts(content)}
    return {**message, "content": _Nothing()} if content is None else dict(message)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return _as_it_is(message)


def _null(message: dict[str, Any]) -> dict[str, Any]:
    return _joined({"content": None, **message})


def _left_out(message: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if name != "content" or value is not None}
    return _joined(given)


def _empty(message: dict[str, Any]) -> dict[str, Any]:
    return {"content": "", **_left_out(message)}


_FORMS: list[Callable[[dict[str, Any]], dict[str, Any]]] = [_as_it_is, _joined, _null, _left_out, _empty]


class _Templates:
    """Compiles templates in a sandbox, with what those written for transformers rely on."""

    def __init__(self) -> None:
        self._environment = _environment()
        self._source: str | None = None
        self._template: jinja2.Template | None = None

    def compile(self, source: str) -> jinja2.Template:
        if self._template is None or source != self._source:
            self._source, self._template = source, self._environment.from_string(source)
        return self._template

    def render(self, source: str, variables: dict[str, Any], messages: list[Any]) -> str:
        pieces: list[str] = []
        pending = self.compile(source).generate(
            **{"tools": None, "documents": None, "add_generation_prompt": True, **variables, "messages": messages}
        )
        return "".join(_bounded(pending, pieces))


def _bounded(pending: Iterator[str], pieces: list[str]) -> list[str]:
    total = 0
    for piece in pending:
        total += len(piece)
        if total > MAX_CHARACTERS:
            raise _LimitError(f"it writes more than {MAX_CHARACTERS} characters")
        pieces.append(piece)
    return pieces


def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationBlock(Extension):
        """``{% generation %}`` marks the answers for training; for us it is just its content."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """A namespace without attributes that Python gives a meaning to."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    def namespace(*entries: Any, **named: Any) -> Namespace:
        result = PlainNamespace()
        for name, value in dict(*entries, **named).items():
            result[name] = value
        return result

    def raise_exception(message: str) -> None:
        raise _RefusedError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # without HTML escapes, unlike jinja2's
        return json.dumps(value, ensure_ascii=ensure_ascii, default=_plain, **options)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def is_none(value: Any) -> bool:
        return value is None or isinstance(value, _Nothing)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.tests["none"] = is_none
    environment.globals |= {
        "namespace": namespace, "raise_exception": raise_exception, "strftime_now": strftime_now
    }  # fmt: skip
    return environment


def _plain(value: Any) -> None:
    if not isinstance(value, _Nothing):
        raise TypeError(f"{type(value).__name__} is not JSON")


if __name__ == "__main__":
    main()
