"""Stop strings: where generated text ends, though it arrives in pieces that care for no such border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gta_edge.errors import InputError
from gta_edge.support.text import brief

__all__ = ["StopStrings"]

_FIRST_MARK, _OTHER_MARK = 0xD800, 0xDFFF
"""Surrogates, which no decoded text contains: each stands for one special token in a stop string, the last for any
that is in none."""


class StopStrings:
    """Passes text on up to the first stop string, which is not passed on.

    The first is the one that is complete first, and of those that end together the longest: so the result does not
    depend on how the text was cut into pieces. Only an end that could still become a stop string is held back.

    A special token has no part in the text that is passed on, but a stop string may contain what it is called, such as
    ``<|im_end|>``: then it is met where that token comes, and also where its name is spelled in ordinary text. An added
    token that is not special has its name for a text, and is met in the same way.

    Args:
        texts: any number of stop strings, or a single one.
        special_tokens: what the special and other added tokens are called, by id.

    Raises:
        InputError: a stop string that is empty or no text, or too many special tokens in them.

    Attributes:
        found: the stop string that was met, None before.
        token_ids: those of ``special_tokens`` that are a stop string by themselves.
    """

    def __init__(self, texts: Sequence[str] = (), special_tokens: Mapping[int, str] | None = None) -> None:
        given = (texts,) if isinstance(texts, str) else tuple(texts)
        for text in given:
            if not isinstance(text, str) or not text or any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"a stop string is {brief(text)}", "expected Unicode text of at least one character")
        named = {id_: name for id_, name in (special_tokens or {}).items() if name and any(name in t for t in given)}
        if len(named) > _OTHER_MARK - _FIRST_MARK:
            raise InputError(f"the stop strings name {len(named)} special tokens", "give fewer")
        self.token_ids = frozenset(id_ for id_, name in named.items() if name in given)
        marks = {id_: chr(_FIRST_MARK + i) for i, id_ in enumerate(named)}
        others = dict.fromkeys(special_tokens or (), chr(_OTHER_MARK)) if named else {}
        self._mark_of = {**others, **marks}
        self._no_marks = {ord(mark): None for mark in self._mark_of.values()}
        self._texts = {text: text for text in given}  # what to look for in text that shows, with what it means
        marked = {_with_marks(text, named, marks): text for text in given}
        self._marked = {form: text for form, text in marked.items() if form != text}
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str, token: int | None = None) -> str:
        """Take what is next and return what may be passed on; nothing once a stop string was found.

        Args:
            piece: text.
            token: the token that it is of; a special one has no text.
        """
        if self.found is not None:
            return ""
        text = self._held + self._mark_of.get(-1 if token is None else token, "") + piece
        shown = self._shown(text)
        matches = _matches(text, text, self._marked) + _matches(text, shown, self._texts)
        if matches:
            _, start, self.found = min(matches)
            self._held = ""
            return self._shown(text[:start])
        border = min(_border(text, text, self._marked), _border(text, shown, self._texts))
        self._held = text[border:]
        return self._shown(text[:border])

    def flush(self) -> str:
        """Return what was held back, now that the text has ended."""
        held, self._held = self._held, ""
        return self._shown(held)

    def _shown(self, text: str) -> str:
        return text.translate(self._no_marks) if self._no_marks else text


def _with_marks(text: str, named: Mapping[int, str], marks: Mapping[int, str]) -> str:
    """Return a stop string with marks for the special tokens in it, the longest names first."""
    for id_, name in sorted(named.items(), key=lambda each: -len(each[1])):
        text = text.replace(name, marks[id_])
    return text


def _matches(text: str, view: str, wanted: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Return (end, start, stop string) in ``text`` of what is found in ``view``, which is text without its marks."""
    found = [(view.find(form), form) for form in wanted]
    return [
        (_place(text, view, start + len(form) - 1) + 1, _place(text, view, start), wanted[form])
        for start, form in found
        if start >= 0
    ]


def _border(text: str, view: str, wanted: Mapping[str, str]) -> int:
    """Return where in ``text`` the longest end of ``view`` begins that could become one of ``wanted``."""
    longest = max(map(len, wanted), default=1) - 1
    for length in range(min(longest, len(view)), 0, -1):
        if any(form.startswith(view[-length:]) for form in wanted):
            return _place(text, view, len(view) - length)
    return len(text)


def _place(text: str, view: str, index: int) -> int:
    """Return where in ``text`` the character ``view[index]`` stands."""
    if len(view) == len(text):
        return index
    places = [i for i, character in enumerate(text) if not "\ud800" <= character <= "\udfff"]
    return places[index]
