"""What is asked of a text that is generated beside others, and what is heard of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gta_edge.errors import GtaEdgeError, InputError
from gta_edge.runtime.generation.answer import FinishReason
from gta_edge.runtime.generation.sampling import Sampling, finite_top
from gta_edge.runtime.session import Logits

__all__ = ["MAX_LOGPROBS", "Constraint", "Event", "RequestOptions", "TokenLogprobs", "log_probabilities"]

MAX_LOGPROBS = 20
"""Alternatives of a token at most, as OpenAI's API has it."""


class Constraint(Protocol):
    """What a text may be: a grammar, for instance. One object is for one text.

    ``prepare`` comes before each step of the model, so that what is allowed may be computed beside it.
    """

    def prepare(self) -> None:
        """Begin to find out which tokens may come next."""

    def apply(self, logits: Logits) -> None:
        """Set the logits [V] of tokens that may not come next to -inf, in place."""

    def accept(self, token: int) -> bool:
        """Note the token that was chosen; return whether the text is complete with it."""


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable a token was: natural logarithms, of the model's own distribution.

    That is the softmax of its logits, before penalties, biases and temperature.

    Attributes:
        token: the token.
        logprob: of it.
        top: the most probable tokens at its place and theirs, the most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOptions:
    """What is asked of one text.

    Attributes:
        sampling: how tokens are chosen.
        max_new_tokens: at most so many; with 0 the prompt is read, and nothing generated.
        stop: texts at which it ends.
        end_token_ids: tokens at which it ends.
        logprobs: for each new token its log probability and those of so many most probable ones; None for none.
        prompt_logprobs: the same for each token of the prompt but the first, all of which is then read.
        constraint: what the text may be.

    Raises:
        InputError: a number that is out of range.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    end_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}", "expected a whole number from 0 up")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise InputError(f"{name} is {value}", f"expected 0 to {MAX_LOGPROBS}")


@dataclass(frozen=True)
class Event:
    """What is new of one text.

    Attributes:
        text: that is now certain; may be empty.
        ids: new tokens; an end token is none of them.
        logprobs: of the new tokens, the end token among them, where they were asked for.
        prompt_logprobs: of the prompt's tokens, the first of which has None; with the first event alone.
        finish_reason: of the last event; None of others.
        error: what ended the text, where the reason is ``error``.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish_reason: FinishReason | None = None
    error: GtaEdgeError | None = None


def log_probabilities(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Return the log probability of a token under ``logits`` [V], and those of the ``count`` most probable ones.

    Raises:
        BackendError: the largest logit is no finite number.
    """
    scores: npt.NDArray[np.float64] = logits.astype(np.float64)
    scores -= scores[finite_top(logits)]
    scores -= np.log(np.exp(scores).sum())
    count = min(count, len(scores))
    top = np.argpartition(-scores, count - 1)[:count] if count else np.zeros(0, np.int64)
    top = top[np.lexsort((top, -scores[top]))]
    return TokenLogprobs(token, float(scores[token]), tuple((int(each), float(scores[each])) for each in top))
