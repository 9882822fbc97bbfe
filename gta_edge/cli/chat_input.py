"""Where messages come from: a line editor on a terminal (prompt_toolkit), plain lines without it, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gta_edge.cli.signals import Terminated, answered
from gta_edge.errors import InputError
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import UnusableError, find_module
from gta_edge.support.text import one_line

__all__ = ["lines_of"]

_PROMPT = "> "
_QUOTE = '"""'


def lines_of(on_terminal: bool, note: Callable[[str], None], commands: Sequence[str]) -> Iterator[str]:
    """Yield messages and commands, without those that are empty, until there are no more.

    On a terminal Ctrl-C drops what was typed. Without an editor, a line that is ``\"\"\"`` begins a message of several
    lines and another one ends it.

    Args:
        on_terminal: whether a person types.
        note: tells a person something.
        commands: to complete.
    """
    asked = _editor(note, commands) if on_terminal else None
    read = asked or (_line_of_person if on_terminal else _line_of_pipe)
    while True:
        try:
            text = read()
            if asked is None and text.strip() == _QUOTE:
                text = _until_quote(read)
        except EOFError:
            return
        except KeyboardInterrupt as interrupt:
            if not on_terminal or isinstance(interrupt, Terminated):
                raise
            answered()
            note("Ctrl-D or /exit ends the conversation")
            continue
        if text.strip():
            yield text.strip()


def _line_of_person() -> str:
    return input(_PROMPT)


def _line_of_pipe() -> str:
    try:
        line = sys.stdin.readline() if sys.stdin is not None else ""
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or closed since
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(error)
        raise InputError(f"standard input cannot be read ({reason})", "pipe messages into it, one a line") from error
    if not line:
        raise EOFError
    return line


def _until_quote(read: Callable[[], str]) -> str:
    lines: list[str] = []
    try:
        while (line := read()).strip() != _QUOTE:
            lines.append(line.rstrip("\n"))
    except EOFError:  # what there is was meant
        pass
    return "\n".join(lines)


def _editor(note: Callable[[str], None], commands: Sequence[str]) -> Callable[[], str] | None:
    """Return what reads a message with an editor; None where there is none."""
    try:
        library = find_module("prompt_toolkit")
    except UnusableError as error:
        note(f"note: {error}; plain input")
        return None
    if library is None:
        note(f"plain input, {_QUOTE} around several lines; for an editor run: {install_command('chat')}")
        return None
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    editor: PromptSession[str] = PromptSession(
        multiline=True, key_bindings=keys, completer=WordCompleter(list(commands), sentence=True)
    )
    note("Enter sends, Alt-Enter begins a new line")
    return lambda: editor.prompt(_PROMPT)
