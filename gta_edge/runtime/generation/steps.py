"""Where a generation's logits come from: a session that runs what it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gta_edge.runtime.generation.sampling import Guess
from gta_edge.runtime.session import Claim, Ids, Logits, Session

__all__ = ["PlainSteps", "StepCounts", "Steps", "Turns"]


@dataclass
class StepCounts:
    """What speculation did so far.

    Attributes:
        calls: of the model, after the prompt.
        drafted: tokens that were run before they were known.
        accepted: those of them that came.
    """

    calls: int = 0
    drafted: int = 0
    accepted: int = 0


class Steps(Protocol):
    """Gives the logits for one token after another."""

    @property
    def guess(self) -> Guess | None:
        """What the logits returned last are to be compared with, where a draft was drawn at random."""

    @property
    def counts(self) -> StepCounts | None:
        """What speculation did; None without it."""

    def after(self, ids: Ids) -> Logits:
        """Return the logits [V] of the token after ``ids`` [N], which begin with those of the call before."""

    def settle(self) -> None:
        """Leave in the cache the ids of the last call of ``after``, and nothing that was run ahead of them."""


class Turns(Protocol):
    """A conversation, of which a generation is a turn: ``conversation.Conversation``."""

    session: Session

    def begin(self) -> Claim:
        """Return the right to go on from the cache; the first call of ``forward`` with it is a whole prompt."""


class PlainSteps:
    """Runs the prompt, and then each token as it is known.

    Args:
        claim: returns the right to the cache for this text, which its first call gives the whole prompt to.
    """

    guess: Guess | None = None
    counts: StepCounts | None = None

    def __init__(self, claim: Callable[[], Claim]) -> None:
        self._begin = claim
        self._claim: Claim | None = None
        self._seen = 0

    def after(self, ids: Ids) -> Logits:
        if self._claim is None:
            self._claim = self._begin()
        logits: Logits = self._claim.forward(ids[None, self._seen :])[0]
        self._seen = len(ids)
        return logits

    def settle(self) -> None:
        """Nothing was run ahead."""
