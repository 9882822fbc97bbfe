"""Options that hold a text to a grammar, as several commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gta_edge.errors import InputError
from gta_edge.support.text_files import read_text

if TYPE_CHECKING:
    from gta_edge.runtime.generation.grammar import GrammarConstraint
    from gta_edge.runtime.session import Session

__all__ = ["GrammarChoice", "given_grammar"]

_MAX_BYTES = 2**20


class GrammarChoice:
    """A grammar as it was asked for.

    Args:
        kind: one of ``gta_edge.runtime.generation.grammar.KINDS``.
        text: of it.
    """

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text

    def constraint(self, session: Session) -> GrammarConstraint:
        """Return what holds one text to it.

        Raises:
            InputError: it cannot be used.
            BackendError: llguidance is not installed.
        """
        from gta_edge.runtime.generation.grammar import Grammar

        return Grammar(session, self.kind, self.text).constraint()


def given_grammar(json_schema: str | None, regex: str | None, grammar: str | None) -> GrammarChoice | None:
    """Return what was asked for; a text that begins with @ names a file.

    Raises:
        InputError: a file that cannot be read.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    chosen = [(kind, text) for kind, text in given.items() if text is not None]
    if len(chosen) > 1:
        raise typer.BadParameter("give one of --json-schema, --regex and --grammar")
    for kind, text in chosen:
        if text.startswith("@"):
            text = read_text(Path(text[1:]), InputError, "give a file with a grammar", max_bytes=_MAX_BYTES)
        return GrammarChoice(kind, text)
    return None
