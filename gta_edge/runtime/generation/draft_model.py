"""Guesses of a smaller model with the same tokenizer."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import numpy as np

from gta_edge.runtime.generation.sampling import Floats, Sampler
from gta_edge.runtime.generation.speculation import Draft
from gta_edge.runtime.session import Claim, Ids, Logits, Session

__all__ = ["DraftModel"]

_EXPECTED = 0.7
"""How often the next token is guessed right, until that is known."""

_DECAY = 0.97
"""Of what was seen, per token: about the last 30 count."""

_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512
"""Calls without a guess after guessing did not pay, twice as many each time."""

_SAMPLES = 9


class DraftModel:
    """Asks another session for the tokens to come, with the sampling of the first.

    Where guesses do not pay the other model is left alone, and tried again after a while.

    Args:
        session: runs the draft model; its cache is taken.
        sampler: chooses the guesses.
        vocabulary: ids of the model that is guessed for (V).

    Raises:
        InputError: the session's cache cannot take tokens back.
    """

    def __init__(self, session: Session, sampler: Sampler, vocabulary: int) -> None:
        session.revocable()  # raises where it can never be
        self.token_seconds = 0.0
        self._session, self._sampler, self._vocabulary = session, sampler, vocabulary
        self._claim: Claim | None = None
        self._ids: Ids = np.zeros(0, np.int64)
        self._held: Ids = np.zeros(0, np.int64)  # what is in its cache
        self._guess: Ids = np.zeros(0, np.int64)
        self._guess_at = 0  # where the first of them was expected
        self._right, self._seen = 2 * _EXPECTED, 2.0
        self._offered = self._lost = False
        self._pause, self._left = _FIRST_PAUSE, 0  # calls
        self._seconds: deque[float] = deque(maxlen=_SAMPLES)

    def chances(self, ids: Ids, limit: int) -> list[float]:
        self._judge(ids)
        unknown = ids[len(self._ids) :] >= self._session.config.vocab_size  # ids of no token, which may be padding
        self._lost = self._lost or bool(unknown.any())
        self._ids = ids
        if self._lost:
            return []
        if self._claim is None and len(ids) < self._session.max_length:
            self._claim = self._session.claim()
            self._run(self._claim, ids)
        if self._offered:  # and it was not asked for
            self._left, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        room = min(limit, self._session.max_length - len(ids), self._revocable())
        if self._claim is None or room < 1:
            return []
        if self._left:
            self._left -= 1
            if not self._left:
                self._right, self._seen = _EXPECTED, 1.0
            return []
        self._offered = True
        return [self._right / self._seen] * room

    def draft(self, count: int) -> Draft:
        assert self._claim is not None  # it was offered
        self._offered = False
        greedy = self._sampler.sampling.greedy
        ids, distributions = self._ids, list[Floats]()
        for _ in range(count):
            started = time.perf_counter()
            logits = self._run(self._claim, ids)
            if greedy:
                token = self._sampler.sample(logits, ids)
            else:
                distributions.append(self._sampler.probabilities(logits, ids))
                token = self._sampler.draw_from(distributions[-1])
            ids = np.append(ids, token)
            self._seconds.append(time.perf_counter() - started)
        self.token_seconds = median(self._seconds)
        self._guess, self._guess_at = ids[len(self._ids) :], len(self._ids)
        return Draft(self._guess, None if greedy else distributions)

    def _judge(self, ids: Ids) -> None:
        """Count how many of the last guess came, until one did not."""
        for guessed, came in zip(self._guess, ids[self._guess_at :], strict=False):
            self._seen = self._seen * _DECAY + 1
            self._right = self._right * _DECAY + float(guessed == came)
            if guessed != came:
                break
        else:
            if len(self._guess):
                self._pause = _FIRST_PAUSE
        self._guess = self._guess[:0]

    def _revocable(self) -> int:
        room = self._session.revocable()
        return self._session.max_length if room is None else room

    def _run(self, claim: Claim, ids: Ids) -> Logits:
        """Return the draft model's logits after ``ids``, as many as there are tokens of the model guessed for."""
        both = min(len(self._held), len(ids) - 1)
        differ = np.flatnonzero(self._held[:both] != ids[:both])
        same = int(differ[0]) if len(differ) else both
        if same < len(self._held):
            claim.truncate(same)
        logits: Logits = claim.forward(ids[None, same:])[0]
        self._held = ids
        if len(logits) < self._vocabulary:
            padding = np.full(self._vocabulary - len(logits), -np.inf, np.float32)
            return np.concatenate([logits, padding])
        return logits[: self._vocabulary]
