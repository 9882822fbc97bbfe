"""One text in the making: what its tokens say, and where it ends."""

from __future__ import annotations

from typing import Literal

import numpy as np

from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.runtime.generation.incremental_decoder import IncrementalDecoder
from gta_edge.runtime.generation.stopping import StopStrings
from gta_edge.runtime.session import Ids

__all__ = ["Answer", "FinishReason"]

FinishReason = Literal["stop", "length", "context", "interrupted", "error"]


class Answer:
    """What a prompt is continued with, a token at a time; whoever samples the tokens hands them to ``take``.

    Args:
        prompt: int64 [N], at least one token.
        tokenizer: of the model; without one there is no text.
        stops: stop strings.
        end_token_ids: tokens that end the text.
        max_new_tokens: at most so many, from 1 up.
        max_length: tokens that the model has positions for.

    Attributes:
        ids: the new tokens, those of a stop string included, an end token not.
        finish_reason: None while there may be more; see ``Generation``.
        prompt_tokens: tokens of the prompt.
        end_token_ids: tokens that end it, those of stop strings included.
        max_new_tokens: tokens that there is room for, and that were asked for.
    """

    def __init__(
        self,
        prompt: Ids,
        tokenizer: Tokenizer | None,
        stops: StopStrings,
        *,
        end_token_ids: frozenset[int],
        max_new_tokens: int,
        max_length: int,
    ) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = len(prompt)
        self._stops = stops
        self.end_token_ids = end_token_ids | stops.token_ids
        # the prompt that fills all positions still has logits for one token more
        self.max_new_tokens = min(max_new_tokens, max_length - len(prompt) + 1)
        self._full: FinishReason = "length" if self.max_new_tokens == max_new_tokens else "context"
        self._all_ids: Ids = np.concatenate([prompt, np.zeros(self.max_new_tokens, np.int64)])
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, prompt.tolist())
        self._pieces: list[str] = []

    @property
    def text(self) -> str | None:
        """All text returned so far, None without a tokenizer; at the end with what was held back for a stop string."""
        return None if self._decoder is None else "".join(self._pieces)

    @property
    def all_ids(self) -> Ids:
        """The prompt and the new tokens, int64 [N]; a view."""
        return self._all_ids[: self.prompt_tokens + len(self.ids)]

    def take(self, token: int) -> str:
        """Note a new token and return the text that is now certain."""
        if token in self.end_token_ids:
            piece = self._said(self._stops.feed("", token))  # a stop string may end with it
            return piece + self.finish("stop")
        self._all_ids[self.prompt_tokens + len(self.ids)] = token
        self.ids.append(token)
        piece = self._said(self._stops.feed(self._decoder.push(token), token) if self._decoder else "")
        if self._stops.found is not None:
            return piece + self.finish("stop")
        return piece + self.finish(self._full) if len(self.ids) == self.max_new_tokens else piece

    def finish(self, reason: FinishReason) -> str:
        """Set the reason, unless there is one, and return what was held back, which is now part of the text."""
        if self.finish_reason is not None:
            return ""
        self.finish_reason = reason
        return self._said(self._stops.flush())

    def _said(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece
