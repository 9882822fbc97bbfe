"""Guesses without a model: what followed the last tokens where they stood before, in the prompt or in the answer.

Known as prompt lookup decoding: text that edits, quotes or repeats its prompt says long parts of it again. Where the
last tokens stood before more than once and something else followed each time, there is more than one guess.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gta_edge.runtime.generation.guesses import TEXT, Candidate, Draft, likeliest
from gta_edge.runtime.session import Ids

__all__ = ["PromptLookup"]

_LONGEST = 16
"""Tokens that are compared, at most."""

_PLACES = 16
"""Places that are compared, the newest first."""

_EXPECTED = {1: 0.1, 2: 0.3, 3: 0.45, 4: 0.6, 6: 0.7, 9: 0.8, 13: 0.9}
_EXPECTED_OTHERS = {1: 0.05, 2: 0.2}
_EXPECTED_COUNTS_AS = 2.0
"""How often the next token is right after a match of so many tokens or more, where it is the first guess, and where
those before it were wrong; and how many tokens' worth that is believed."""

_DECAY = 0.97
"""Of what was seen, per token: about the last 30 of a class count."""


class _Match(NamedTuple):
    """A place where the last tokens stood before, and how many of them did."""

    length: int
    place: int


class _Counts:
    """How often guesses after matches were right, in classes by the length of the match.

    Args:
        expected: that, by the shortest of each class.
    """

    def __init__(self, expected: Mapping[int, float]) -> None:
        self._shortest = list(expected)
        self._right = [chance * _EXPECTED_COUNTS_AS for chance in expected.values()]
        self._seen = [_EXPECTED_COUNTS_AS] * len(expected)

    def add(self, length: int, right: bool) -> None:
        kind = bisect(self._shortest, length) - 1
        self._seen[kind] = self._seen[kind] * _DECAY + 1
        self._right[kind] = self._right[kind] * _DECAY + right

    def chance(self, length: int) -> float:
        kind = bisect(self._shortest, length) - 1
        return self._right[kind] / self._seen[kind]


class _Guess(NamedTuple):
    """A token that may come, or with an empty path the text.

    Attributes:
        path: the tokens of the guess up to it.
        matches: places that it was found behind, the longest and newest match first.
        length: of the longest match, with the path before it.
        counts: how often such guesses were right.
    """

    path: tuple[int, ...]
    matches: Sequence[_Match]
    length: int
    counts: _Counts

    @property
    def token(self) -> int:
        return self.path[-1]


class PromptLookup:
    """Guesses the tokens that followed the longest match of the last tokens, and those that followed other matches.

    How often that was right is counted for matches of each length, also where the guess was not run: so nothing is
    lost on text that does not repeat. Guesses that are not the first for their place are counted by themselves.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # what comes after one token, or two: where it stands
        self._indexed = 1  # places before this one are noted
        self._branches = False
        self._first, self._others = _Counts(_EXPECTED), _Counts(_EXPECTED_OTHERS)
        self._end = 0  # of the text that was guessed for last
        self._text = _Guess((), [], 0, self._first)
        self._offered: list[tuple[Candidate, _Guess]] = []

    def offer(self, ids: Ids, limit: int, branches: bool, least: float = 0.0) -> list[Candidate]:
        self._ids.extend(ids[len(self._ids) :].tolist())
        self._judge()
        self._index()
        self._branches, self._end = branches, len(self._ids)
        self._text = _Guess((), self._matches(), 0, self._first)
        pays = any(chance >= least for chance, _ in self._chances(self._text)[:1])
        self._offered = likeliest(limit, self._text, self._chances) if limit and pays else []
        return [candidate for candidate, _ in self._offered]

    def seconds(self, chosen: Sequence[int]) -> float:
        return 0.0

    def draft(self, chosen: Sequence[int]) -> Draft:
        place = {node: i for i, node in enumerate([TEXT, *chosen], TEXT)}
        tokens = [self._offered[node][1].token for node in chosen]
        return Draft(np.array(tokens, np.int64), [place[self._offered[node][0].parent] for node in chosen])

    def _chances(self, guess: _Guess) -> list[tuple[float, _Guess]]:
        return [(each.counts.chance(each.length), each) for each in self._following(guess)]

    def _judge(self) -> None:
        """Count which of the tokens that could be guessed came, until none did; also of those that were not offered."""
        state = self._text
        for came in self._ids[self._end :]:
            following = self._following(state)
            for guess in following:
                guess.counts.add(guess.length, guess.token == came)
                if guess.token == came:
                    state = guess
                    break
            else:
                return

    def _following(self, guess: _Guess) -> list[_Guess]:
        """Return what may follow a guess, the longest and newest match first; one token only without branches."""
        ids, end, path = self._ids, self._end, guess.path
        found: dict[int, list[_Match]] = {}
        for match in guess.matches if self._branches else guess.matches[:1]:
            at = match.place + len(path)
            # a source that runs into the guess itself goes on in it: a loop of any period
            found.setdefault(ids[at] if at < end else path[at - end], []).append(match)
        return [
            _Guess((*path, token), matches, matches[0].length + len(path), self._others if rank else self._first)
            for rank, (token, matches) in enumerate(found.items())
        ]

    def _index(self) -> None:
        """Note every place but the end itself, which nothing has followed yet."""
        for place in range(self._indexed, len(self._ids)):
            for count in range(1, min(2, place) + 1):
                self._places.setdefault(tuple(self._ids[place - count : place]), []).append(place)
        self._indexed = max(self._indexed, len(self._ids))

    def _matches(self) -> list[_Match]:
        """Return matches of the last tokens, the longest first, and the newest of equal ones.

        Those of a single token only where longer ones leave room: it hardly ever says what comes.
        """
        ids, end, found = self._ids, len(self._ids), list[_Match]()
        for place in self._newest(2):
            length = 2
            while length < min(_LONGEST, place) and ids[place - 1 - length] == ids[end - 1 - length]:
                length += 1
            found.append(_Match(length, place))
            if length == _LONGEST and not self._branches:
                break
        found.sort(key=lambda match: -match.length)
        room = _PLACES - len(found) if self._branches else 1 - len(found)
        if room > 0:
            singles = [place for place in self._newest(1) if place == 1 or ids[place - 2] != ids[-2]]
            found += [_Match(1, place) for place in singles[:room]]
        return found

    def _newest(self, count: int) -> list[int]:
        """Return the newest places that the last one or two tokens come before, the newest first."""
        last = tuple(self._ids[-count:])
        return self._places.get(last, [])[: -_PLACES - 1 : -1] if len(last) == count else []
