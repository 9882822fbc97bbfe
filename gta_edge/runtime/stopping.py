"""Stop texts: where generated text ends, though it arrives in pieces that care for no such border."""

from __future__ import annotations

from collections.abc import Sequence

from gta_edge.errors import InputError

__all__ = ["StopTexts"]


class StopTexts:
    """Passes text on up to the first stop text, which is not passed on.

    The first is the one that is complete first, and of those that end together the longest: so the result does not
    depend on how the text was cut into pieces. Only an end that could still become a stop text is held back.

    Args:
        texts: any number of stop texts, or a single one.

    Raises:
        InputError: a stop text that is empty or no text.

    Attributes:
        found: the stop text that was met, None before.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._texts: tuple[str, ...] = (texts,) if isinstance(texts, str) else tuple(texts)
        for text in self._texts:
            if not isinstance(text, str) or not text:
                raise InputError(f"a stop text is {text!r}; expected text of at least one character: leave it out")
        self._longest = max(map(len, self._texts), default=0)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece and return what may be passed on; nothing once a stop text was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        matches = [(start + len(stop), start, stop) for stop in self._texts if (start := text.find(stop)) >= 0]
        if matches:
            _, start, self.found = min(matches)
            self._held = ""
            return text[:start]
        border = len(text) - self._pending(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """Return what was held back, now that the text has ended."""
        held, self._held = self._held, ""
        return held

    def _pending(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop text."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._texts):
                return length
        return 0
