"""Guesses of what comes next in the texts of a batch: a step may have several tokens of each, not as many of all.

A step is as wide as its longest guess, and rows with shorter ones are padded. So its width is decided for all of them:
the one for which a token costs least, by how often guesses came true lately in each text and by what steps of as many
rows and of that width take in this session. Where there are many texts a step is dear by its tokens, and little is
guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from gta_edge.runtime.generation.guesses import Candidate
from gta_edge.runtime.generation.lookup import PromptLookup
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.generation.text import Text
from gta_edge.runtime.session import Ids, Session
from gta_edge.runtime.step_costs import WIDTHS, StepCosts

__all__ = ["BatchGuesses", "width_that_pays"]

_WORTH_IT = 1.02
"""What a token is to cost less for a wider step to be made: estimates are not better than that."""

_PATIENCE = 8
_SHORTEST_PAUSE, _LONGEST_PAUSE = 4, 32
"""Steps in which a text is looked at without a guess that pays, and then left alone: a look takes 50 microseconds, some
percent of a small model's step. Each pause is twice as long as the one before, until a guess pays again."""

_NOTHING: Ids = np.zeros(0, np.int64)


class _Guesser:
    """Guesses the tokens of one text, and leaves it alone for a while where that does not pay."""

    def __init__(self) -> None:
        self._lookup = PromptLookup()
        self._looks = 0  # since a guess paid
        self._left_alone, self._pause = 0, _SHORTEST_PAUSE

    def offer(self, ids: Ids, limit: int) -> Sequence[Candidate]:
        """Return what could come after ``ids`` [N], each after the one before it."""
        if self._left_alone:
            self._left_alone -= 1
            return ()
        if self._looks == _PATIENCE:
            self._looks, self._left_alone, self._pause = 0, self._pause - 1, min(2 * self._pause, _LONGEST_PAUSE)
            return ()
        self._looks += 1
        return self._lookup.offer(ids, limit, branches=False)

    def draft(self, count: int) -> Ids:
        """Return the first tokens of what was offered last."""
        self._looks, self._pause = 0, _SHORTEST_PAUSE
        return self._lookup.draft(range(count)).ids


class BatchGuesses:
    """Guesses tokens by lookup in each text of a batch, and learns what they are worth.

    Args:
        session: runs the batch.
        counts: is told what was guessed.

    Raises:
        InputError: the session's cache cannot take tokens back.
    """

    def __init__(self, session: Session, counts: StepCounts) -> None:
        session.revocable()  # raises where it can never be
        self._session, self._counts = session, counts
        self._guessers: WeakKeyDictionary[Text, _Guesser] = WeakKeyDictionary()
        self._costs: dict[int, StepCosts] = {}  # of steps, by the rows that they compute

    def drafts(self, rows: Mapping[int, Text]) -> dict[int, Ids]:
        """Return what to guess of each text, int64 [K] for its row, none to the most of ``WIDTHS``.

        Args:
            rows: the texts that the next step gives a token, by their row of the batch.
        """
        room = self._room()
        offered = {row: self._offered(text, room) for row, text in rows.items()}
        width = width_that_pays(self._of(rows), list(offered.values()))
        found = dict.fromkeys(rows, _NOTHING)
        for row, candidates in offered.items():
            if width > 1 and candidates:
                found[row] = self._guessers[rows[row]].draft(min(width - 1, len(candidates)))
        return found

    def note(self, rows: Mapping[int, Text], drafts: Mapping[int, Ids], seconds: float) -> None:
        """Note what the step took."""
        self._of(rows).add(1 + max(map(len, drafts.values())), seconds)
        self._counts.calls += 1
        for row, draft in drafts.items():
            rows[row].drafted += len(draft)
            self._counts.drafted += len(draft)

    def accept(self, text: Text) -> None:
        """Note that the next token that was guessed of a text has come."""
        text.accepted += 1
        self._counts.accepted += 1

    def _of(self, rows: Mapping[int, Text]) -> StepCosts:
        return self._costs.setdefault(max(rows) + 1 - min(rows), StepCosts())

    def _room(self) -> int:
        """Return how many tokens can be guessed: none that would pass the last position, or could not be taken back."""
        session = self._session
        limit = min(WIDTHS[-1], session.max_length - int(session.length.max())) - 1
        revocable = session.revocable()
        return max(0, limit if revocable is None else min(limit, revocable))

    def _offered(self, text: Text, room: int) -> Sequence[Candidate]:
        """Return what could come of a text, each after the one before it."""
        left = text.answer.max_new_tokens - len(text.answer.ids) - 1
        guesser = self._guessers.setdefault(text, _Guesser())
        return guesser.offer(text.answer.all_ids, max(0, min(room, left)))


def width_that_pays(costs: StepCosts, offered: Sequence[Sequence[Candidate]]) -> int:
    """Return the width of the next step for which a token costs least, 1 where nothing is guessed.

    Args:
        costs: of steps of as many rows.
        offered: of each text, what could be guessed: each follows the one before it, with the likelihood that it comes.
    """
    longest = max(map(len, offered))
    if not longest or not costs.known or costs.due:
        return 1
    single, best, gain = costs.seconds(1) / len(offered), 1, _WORTH_IT
    for width in WIDTHS[1:]:
        if width > longest + 1:
            break
        expected = len(offered) + sum(each.likelihood for guess in offered for each in guess[: width - 1])
        found = single * expected / costs.seconds(width)
        if found > gain:
            best, gain = width, found
    return best
