"""What every command has in common: ``--json``, ``--quiet``, ``--debug``, progress, errors and exit status."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gta_edge.cli.loading import load_libraries
from gta_edge.cli.signals import exit_status, received_status
from gta_edge.errors import GtaEdgeError
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import one_line, printable

if TYPE_CHECKING:  # loaded when it is used: help and the version do without
    import rich.console
    import rich.table

__all__ = [
    "FAILED",
    "MAX_USAGE",
    "SCHEMA_VERSION",
    "Output",
    "as_line",
    "command",
    "current",
    "fill",
    "key_value_table",
]

FAILED = 1
SCHEMA_VERSION = 1
"""Of all documents that ``--json`` prints; it grows when a key goes or changes its meaning, not when one is added."""

_MAX_LINE = 1200
_MAX_WORD = 240
_KEPT_END = 160
MAX_USAGE = 560
"""Characters of what is wrong with a call, which may be quoted at any length."""
_MIN_COLUMNS = 20


@dataclass
class Output:
    """How this run of a command speaks.

    Attributes:
        json: print one JSON document on stdout, and nothing else anywhere.
        quiet: no progress.
        debug: let errors through with their traceback.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    @cached_property
    def console(self) -> rich.console.Console:
        """Stdout, as wide as its terminal."""
        import rich.console

        return rich.console.Console()

    def document(self, content: dict[str, Any]) -> None:
        """Print the result as JSON (docs/json.md); what JSON cannot say (infinity, NaN) becomes null."""
        from gta_edge.support.json_text import json_text

        print(json_text({"schema_version": SCHEMA_VERSION, **content}, sys.stdout.encoding))

    def note(self, text: str) -> None:
        """Tell a person something on stderr."""
        if not (self.json or self.quiet):
            print(printable(text), file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield a progress callable: on a terminal a bar, or a spinner for what cannot count; nothing elsewhere."""
        if self.json or self.quiet or not sys.stderr.isatty():
            yield silent
            return
        import rich.console
        import rich.progress

        columns = (
            rich.progress.SpinnerColumn(finished_text=" "),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bars:
            tasks: dict[str, rich.progress.TaskID] = {}

            spinning: list[rich.progress.TaskID] = []

            def end_spinner() -> None:
                while spinning:
                    bars.update(spinning.pop(), completed=1, total=1)

            def report(what: str, done: int, total: int) -> None:
                end_spinner()
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total or None)
                if total:
                    bars.update(tasks[what], completed=done, total=total)
                else:
                    spinning.append(tasks[what])

            yield report
            end_spinner()


_current = Output()


def current() -> Output:
    """Return how the running command was asked to speak."""
    return _current


# Options that every command has, in typer's form.
_COMMON = {
    "json": Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Show no progress.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")],
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return ``function`` with the common options, its errors turned into one line and an exit status."""

    @functools.wraps(function)
    def run(**options: Any) -> None:
        global _current  # one command a process
        _current = Output(**{name: options.pop(name) for name in _COMMON})
        load_libraries()
        try:
            with _notes():
                function(**options)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as interrupt:
            if _current.debug:
                raise
            sys.exit(exit_status(interrupt))
        except BrokenPipeError:
            _leave_closed_pipe()
        except Exception as error:  # the last resort: one line for a person, whatever went wrong
            if _current.debug:
                raise
            if (status := received_status()) is not None:  # a library made an error of Ctrl-C
                sys.exit(status)
            _fail(*((error.problem, error.remedy) if isinstance(error, GtaEdgeError) else _describe(error)))

    own = inspect.signature(function).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    common = [inspect.Parameter(name, kind, default=False, annotation=hint) for name, hint in _COMMON.items()]
    run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {**function.__annotations__, **_COMMON}
    return run


class _Notes(logging.Handler):
    """Says on stderr what the package warns of; with ``--quiet`` and ``--json`` nobody hears it."""

    def emit(self, record: logging.LogRecord) -> None:
        _current.note(f"note: {one_line(record.getMessage())}")


@contextmanager
def _notes() -> Iterator[None]:
    handler, log = _Notes(logging.WARNING), logging.getLogger("gta_edge")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def key_value_table(rows: dict[str, str]) -> rich.table.Table:
    """Return a plain two-column table."""
    import rich.markup
    import rich.table

    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows.items():
        table.add_row(rich.markup.escape(printable(key)), rich.markup.escape(printable(value)))
    return table


def fill(text: str, width: int, indent: str = "", first: str | None = None) -> str:
    """Return ``text`` in lines of at most ``width`` characters; addresses and paths stay whole, however long.

    Args:
        text: one paragraph.
        width: characters of a line, its indent included.
        indent: of every line.
        first: of the first line, where that differs.
    """
    return textwrap.fill(
        text,
        max(width, len(indent) + _MIN_COLUMNS),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _describe(error: BaseException) -> tuple[str, str | None]:
    """Return problem and remedy of what the package did not raise itself."""
    from gta_edge.libraries.install import reinstall_command
    from gta_edge.libraries.optional import too_old

    name = type(error).__name__
    if isinstance(error, MemoryError):
        return "not enough memory", "use a smaller model, a shorter context, or close other programs"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'})", "free some space and run again"
    if isinstance(error, OSError):
        where = error.filename or "input or output"
        return f"{where}: {error.strerror or error}", "check the path and its permissions"
    if isinstance(error, (AttributeError, ImportError, TypeError)) and (old := too_old()):
        return f"{old} ({name}: {error})", None  # what it lacks, or took in another form then
    if isinstance(error, ImportError):
        return f"a library cannot be loaded ({one_line(error)})", f"run: {reinstall_command()}"
    return f"unexpected {name}: {error}", "run again with --debug and please report it"


def as_line(message: str, longest: int = _MAX_LINE) -> str:
    """Return a message as one printable line; the middle goes of a word (a path) or a line that is too long."""
    line = " ".join(map(_as_word, message.split()))
    return line if len(line) <= longest else f"{line[: longest - _KEPT_END]} … {line[-_KEPT_END:]}"


def _as_word(word: str) -> str:
    word = printable(word)
    return word if len(word) <= _MAX_WORD else f"{word[: _MAX_WORD // 2]}…{word[-_MAX_WORD // 2 :]}"


def _fail(message: str, remedy: str | None) -> None:
    end = f"; {printable(' '.join(remedy.split()))}" if remedy else ""  # whole: it may be a command
    print(f"error: {as_line(message)}{end}", file=sys.stderr)
    sys.exit(FAILED)


def _leave_closed_pipe() -> None:
    """Whoever read our output has gone: that is no error, and Python must not complain when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
