"""Guesses without a model: what followed the last tokens where they stood before, in the prompt or in the answer.

Known as prompt lookup decoding: text that edits, quotes or repeats its prompt says long parts of it again.
"""

from __future__ import annotations

import numpy as np

from gta_edge.runtime.generation.speculation import Draft
from gta_edge.runtime.session import Ids

__all__ = ["PromptLookup"]

_SHORTEST = 2
"""Tokens that must agree: after a single one hardly ever the same comes again."""

_LONGEST = 16
"""Tokens that are compared, at most."""

_PLACES = 16
"""Places that are compared, the newest first."""

_LOWEST_OF_CLASS = (2, 3, 4, 6, 9, 13)
"""Matches are told apart by their length: these are the shortest of each class."""

_EXPECTED = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9)
_EXPECTED_COUNTS_AS = 2.0
"""How often the next token is right after a match of each class, and how many tokens' worth that is believed."""

_DECAY = 0.97
"""Of what was seen, per token: about the last 30 of a class count."""


class PromptLookup:
    """Guesses the tokens that followed the longest match of the last tokens.

    How often that was right is counted for matches of each length, also where the guess was not run: so nothing is
    lost on text that does not repeat.
    """

    token_seconds = 0.0

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # what comes after each pair of tokens: where it stands
        self._indexed = _SHORTEST  # places before this one are noted
        self._guess: list[int] = []
        self._guess_at = 0  # where the first of them was expected
        self._match = 0  # tokens that agreed before it
        self._right = [p * _EXPECTED_COUNTS_AS for p in _EXPECTED]
        self._seen = [_EXPECTED_COUNTS_AS] * len(_EXPECTED)

    def chances(self, ids: Ids, limit: int) -> list[float]:
        self._ids.extend(ids[len(self._ids) :].tolist())
        self._judge()
        self._index()
        place, self._match = self._longest_match()
        end = len(self._ids)
        # a source that runs into the guess itself goes on in it: a loop of any period
        self._guess, self._guess_at = [], end
        if place is not None:
            for i in range(place, place + limit):
                self._guess.append(self._ids[i] if i < end else self._guess[i - end])
        return [self._chance(self._match + i) for i in range(len(self._guess))]

    def draft(self, count: int) -> Draft:
        return Draft(np.array(self._guess[:count], np.int64), None)

    def _judge(self) -> None:
        """Count how many of the last guess came, until one did not."""
        for i, (guessed, came) in enumerate(zip(self._guess, self._ids[self._guess_at :], strict=False)):
            kind = _class_of(self._match + i)
            self._seen[kind] = self._seen[kind] * _DECAY + 1
            self._right[kind] = self._right[kind] * _DECAY + (guessed == came)
            if guessed != came:
                break

    def _chance(self, match: int) -> float:
        kind = _class_of(match)
        return self._right[kind] / self._seen[kind]

    def _index(self) -> None:
        """Note every place but the end itself, which nothing has followed yet."""
        for place in range(self._indexed, len(self._ids)):
            self._places.setdefault((self._ids[place - 2], self._ids[place - 1]), []).append(place)
        self._indexed = max(self._indexed, len(self._ids))

    def _longest_match(self) -> tuple[int | None, int]:
        """Return where the tokens that follow the longest match begin, the newest of equal ones, and its length."""
        ids, end = self._ids, len(self._ids)
        best, longest = None, _SHORTEST - 1
        for place in reversed(self._places.get((ids[-2], ids[-1]), [])[-_PLACES:]) if end >= _SHORTEST else ():
            length = _SHORTEST
            while length < min(_LONGEST, place) and ids[place - 1 - length] == ids[end - 1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length == _LONGEST:
                    break
        return best, longest


def _class_of(match: int) -> int:
    return sum(match >= lowest for lowest in _LOWEST_OF_CLASS[1:])
