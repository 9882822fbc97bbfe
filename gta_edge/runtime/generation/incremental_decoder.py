"""Text that can be shown while its tokens still arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gta_edge.formats.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer"]

_UNKNOWN_CHARACTER = "\ufffd"
"""What a decoder gives for bytes that are no UTF-8, or not yet."""

_WINDOW = 16
"""Tokens after which a window that cannot be closed is cut; also those of a prompt that are decoded again."""

_WINDOW_KEPT = 4
"""Tokens that a cut leaves: an unfinished character has at most 3 bytes, so at most 3 of them belong to it."""


class IncrementalDecoder:
    """Text of tokens that arrive one at a time: what is returned is final, and never part of a character.

    It is what the tokens add to the prompt's text. The same tokens may have another text at the very beginning, where
    sentencepiece's decoders drop a space, and so the end of the prompt is decoded with them.

    Bytes that can become no character give U+FFFD as soon as that is certain. A character that is still incomplete
    when the tokens end is never returned, so there is nothing to flush. One that the prompt leaves incomplete is
    returned with the tokens that complete it.

    The library's own ``DecodeStream`` is not used: it returns nothing while bytes are invalid, at a cost that grows
    with their square, and after a byte-fallback character followed by an invalid byte it fails for good.

    What a token adds is the growth of a window's text by it, since the text of a token alone lacks its leading space.

    Args:
        tokenizer: of the tokens.
        prompt: ids of what the tokens continue.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._returned = 0  # characters of the window's text that were returned, or belong to tokens before
        self._begun = False
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self._last_with_text(prompt):
            self.push(token)

    def _last_with_text(self, prompt: Sequence[int]) -> list[int]:
        found: list[int] = []
        for token in reversed(prompt):
            if len(found) == _WINDOW:
                break
            if not self._tokenizer.is_silent(int(token)):
                found.append(int(token))
        return found[::-1]

    def push(self, token: int) -> str:
        """Take the next id and return the text that is now complete, often one token's, sometimes none."""
        if self._tokenizer.is_silent(token):
            return ""
        value = self._tokenizer.byte_value(token)
        is_first, self._begun = not self._begun, True
        if value is not None:
            # not by the window: the library spoils the whole run of byte tokens while its last character is incomplete
            self._restart([token])
            piece = self._bytes.decode(bytes([value]))
            return self._tokenizer.decode([token]) if is_first and piece else piece  # a space may be dropped
        broken = self._bytes.decode(b"", final=True)  # U+FFFD if the byte tokens before ended within a character
        return broken + self._grow(token)

    def _grow(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # a byte-level tokenizer gives one U+FFFD for an incomplete character at the end, however many bytes it has
        held = text.endswith(_UNKNOWN_CHARACTER) and not self._tokenizer.has_byte_fallback
        end = len(text) - held
        piece = text[self._returned : end]
        self._returned = max(self._returned, end)
        if not held:
            self._restart([token])
        elif len(self._window) > _WINDOW:
            self._restart(self._window[-_WINDOW_KEPT:])
            self._returned -= 1
        return piece

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._returned = len(self._tokenizer.decode(window))
