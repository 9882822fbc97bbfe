"""Guesses of a smaller model with the same tokenizer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from gta_edge.runtime.generation.guesses import NOTHING, TEXT, Candidate, Draft, likeliest
from gta_edge.runtime.generation.sampling import Floats, Sampler
from gta_edge.runtime.session import Claim, Ids, Logits, Session

__all__ = ["DraftModel"]

_EXPECTED = (0.7, 0.4, 0.25, 0.15)
"""How often the first, second, … guess for a token is right where those before it were not, until that is known."""

_EXPECTED_COUNTS_AS = 2.0
"""Tokens that this is believed like."""

_DECAY = 0.97
"""Of what was seen, per token: about the last 30 count."""

_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512
"""Calls without a guess after guessing did not pay, twice as many each time."""

_STEP = 2
"""Tokens of a call at most that goes on with a guess, or begins one: what came, behind the last of the guess before."""


class DraftModel:
    """Asks another session for the tokens to come, with the sampling of the first.

    The other model runs one chain, the likeliest tokens. With branches each of them has alternatives beside it, the
    next likeliest by the same logits; they take no run of the other model, and so nothing is guessed behind them.

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
        self._session, self._sampler, self._vocabulary = session, sampler, vocabulary
        self._claim: Claim | None = None
        self._ids: Ids = np.zeros(0, np.int64)
        self._held: Ids = np.zeros(0, np.int64)  # what is in its cache
        self._width = 0  # tokens of its last call
        self._guess = NOTHING
        self._guess_at = 0  # where the first of it was expected
        self._right = [chance * _EXPECTED_COUNTS_AS for chance in _EXPECTED]  # by how many guesses came before it
        self._seen = [_EXPECTED_COUNTS_AS] * len(_EXPECTED)
        self._offered: list[Candidate] = []
        self._asked = self._lost = False
        self._pause, self._left = _FIRST_PAUSE, 0  # calls

    def offer(self, ids: Ids, limit: int, branches: bool, least: float = 0.0) -> list[Candidate]:
        self._judge(ids)
        unknown = ids[len(self._ids) :] >= self._session.config.vocab_size  # ids of no token, which may be padding
        self._lost = self._lost or bool(unknown.any())
        self._ids = ids
        refused, self._offered = self._offered and not self._asked, []
        if self._lost:
            return []
        if self._claim is None and len(ids) < self._session.max_length:
            self._claim = self._session.claim()
            self._run(self._claim, ids)
        if refused:
            self._left, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        room = min(limit, self._session.max_length - len(ids), self._revocable())
        if self._claim is None or room < 1:
            return []
        if self._left:
            self._left -= 1
            if not self._left:
                self._right[0], self._seen[0] = _EXPECTED[0], 1.0
            return []
        self._asked, self._offered = False, self._likeliest(room, branches)
        return self._offered

    def seconds(self, chosen: Sequence[int]) -> float:
        costs, runs = self._session.step_costs, len({self._offered[node].parent for node in chosen})
        return runs * costs.seconds(1) if costs.known else 0.0

    def draft(self, chosen: Sequence[int]) -> Draft:
        assert self._claim is not None  # it was offered
        self._asked, ids, node = True, self._ids, TEXT
        token, distributions = dict[int, int](), dict[int, Floats]()
        while following := [i for i in chosen if self._offered[i].parent == node]:
            started = time.perf_counter()
            logits = self._run(self._claim, ids)
            if self._sampler.sampling.greedy:
                found = self._sampler.best(logits, ids, len(following))
            else:
                distributions[node] = self._sampler.probabilities(logits, ids)
                found = self._sampler.draw_several(distributions[node], len(following))
            token |= zip(following, found, strict=False)  # there may be fewer tokens that can be drawn
            node = following[0]
            ids = np.append(ids, token[node])
            if self._width <= _STEP:  # otherwise it read what came while it was left alone
                self._session.step_costs.add(self._width, time.perf_counter() - started)
        there = [i for i in chosen if i in token]
        place = {i: at for at, i in enumerate([TEXT, *there], TEXT)}
        tokens = np.array([token[i] for i in there], np.int64)
        drawn = {place[i]: each for i, each in distributions.items()} or None
        self._guess = Draft(tokens, [place[self._offered[i].parent] for i in there], drawn)
        self._guess_at = len(self._ids)
        return self._guess

    def _likeliest(self, room: int, branches: bool) -> list[Candidate]:
        """Return what to offer: what follows a token of the chain, and nothing that follows others."""
        chances = [right / seen for right, seen in zip(self._right, self._seen, strict=True)]
        following = [(chance, rank == 0) for rank, chance in enumerate(chances if branches else chances[:1])]
        return [each for each, _ in likeliest(room, True, lambda of_chain: following if of_chain else [])]

    def _judge(self, ids: Ids) -> None:
        """Count which of the last guess came, until nothing of it did."""
        node, guess, self._guess = TEXT, self._guess, NOTHING
        for came in ids[self._guess_at :].tolist():
            following = guess.after(node)
            for rank, node in enumerate(following):
                self._seen[rank] = self._seen[rank] * _DECAY + 1
                self._right[rank] = self._right[rank] * _DECAY + float(guess.ids[node] == came)
                if guess.ids[node] == came:
                    break
            else:
                if not following and len(guess.ids):  # all of it came
                    self._pause = _FIRST_PAUSE
                return

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
        self._held, self._width = ids, len(ids) - same
        if len(logits) < self._vocabulary:
            padding = np.full(self._vocabulary - len(logits), -np.inf, np.float32)
            return np.concatenate([logits, padding])
        return logits[: self._vocabulary]
