"""Speculative decoding: tokens that are likely to come are run together with the one that has come.

The model gives logits for all of them at once, and while the tokens that are then chosen follow the guess, the logits
for the next ones are there already. Nothing else changes: tokens are chosen one by one, in order, from the model's
logits. So what is generated is what would be generated without it; of a guess drawn at random, see ``Sampler.sample``
(arXiv 2211.17192, 2302.01318).

How many are guessed is decided anew for each call, by how often guesses came true lately and by what a wider call
costs in this session; where guessing does not pay, nothing is guessed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.generation.sampling import Guess
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.session import Claim, Ids, Logits, Session
from gta_edge.runtime.step_costs import WIDTHS, StepCosts

__all__ = ["Draft", "Proposer", "SpeculativeSteps", "width_that_pays"]

_WORTH_IT = 1.02
"""What a token is to cost less for a wider call to be made: estimates are not better than that."""


@dataclass(frozen=True)
class Draft:
    """Tokens that may come.

    Attributes:
        ids: int64 [K].
        probabilities: of a draft drawn at random, the distributions, float64 [K, V]; None of one that was not drawn.
    """

    ids: Ids
    probabilities: Sequence[npt.NDArray[np.float64]] | None


class Proposer(Protocol):
    """Guesses what comes next."""

    token_seconds: float
    """What it takes to guess one token."""

    def chances(self, ids: Ids, limit: int) -> Sequence[float]:
        """Return for each token that could be guessed, at most ``limit``, how likely it comes if those before it do.

        Args:
            ids: every token so far, int64 [N]; they begin with those of the call before.
            limit: of tokens.
        """

    def draft(self, count: int) -> Draft:
        """Return at most ``count`` tokens to come after the ids given last."""


class SpeculativeSteps:
    """Runs the prompt, and then each token with a guess of those that follow.

    Args:
        session: what runs the model.
        proposer: guesses.
        total: tokens of prompt and answer at most; no more are run than lead there.
        claim: returns the right to the cache for this text; the session's own by default.

    Raises:
        InputError: the session's cache cannot take tokens back.
    """

    def __init__(
        self, session: Session, proposer: Proposer, total: int, claim: Callable[[], Claim] | None = None
    ) -> None:
        session.revocable()  # raises where it can never be
        self.counts: StepCounts | None = StepCounts()
        self._counts = self.counts
        self._session, self._proposer, self._total = session, proposer, total
        self._begin = claim or session.claim
        self._claim: Claim | None = None
        self._held = 0  # tokens in the cache
        self._wanted = 0  # ids of the last call of ``after``
        self._start = 0  # tokens before which there are no logits any more
        self._logits: Logits = np.zeros((0, 0), np.float32)  # [1 + K, V]: after _start tokens, and each of the draft
        self._draft = Draft(np.zeros(0, np.int64), None)

    @property
    def guess(self) -> Guess | None:
        at = self._wanted - self._start
        if self._draft.probabilities is None or at >= len(self._draft.ids):
            return None
        return Guess(int(self._draft.ids[at]), self._draft.probabilities[at])

    def after(self, ids: Ids) -> Logits:
        self._wanted = len(ids)
        at = len(ids) - self._start
        if 0 < at < len(self._logits) and np.array_equal(ids[self._start :], self._draft.ids[:at]):
            self._counts.accepted += 1
            ahead: Logits = self._logits[at]
            return ahead
        if self._claim is None:
            self._claim = self._begin()
            self._run(self._claim, ids, 0)
        else:
            if self._held >= len(ids):
                self._claim.truncate(len(ids) - 1)
                self._held = len(ids) - 1
            self._run(self._claim, ids, self._room(ids))
        first: Logits = self._logits[0]
        return first

    def settle(self) -> None:
        if self._claim is not None and self._held > self._wanted:
            self._claim.truncate(self._wanted)
            self._held = self._wanted

    def _room(self, ids: Ids) -> int:
        """Return how many tokens can be guessed: no more than are asked for, and than the cache can take back."""
        limit = min(WIDTHS[-1], self._total - len(ids)) - 1
        revocable = self._session.revocable()
        return max(0, limit if revocable is None else min(limit, revocable))

    def _run(self, claim: Claim, ids: Ids, room: int) -> None:
        """Run what is not in the cache, and a guess after it."""
        is_prompt, costs = not self._held, self._session.step_costs
        chances = self._proposer.chances(ids, room)  # also without room for a guess: it learns from what came
        width = 1 if is_prompt else width_that_pays(costs, chances[:room], self._proposer.token_seconds)
        self._draft = self._proposer.draft(width - 1) if width > 1 else Draft(np.zeros(0, np.int64), None)
        tokens = np.concatenate([ids[self._held :], self._draft.ids])
        started = time.perf_counter()
        if is_prompt:
            self._logits = claim.forward(tokens[None])
        else:
            self._logits = claim.forward(tokens[None], all_logits=True)[0]
            costs.add(len(tokens), time.perf_counter() - started)
            self._counts.calls += 1
        self._counts.drafted += len(self._draft.ids)
        self._start, self._held = len(ids), len(ids) + len(self._draft.ids)


def width_that_pays(costs: StepCosts, chances: Sequence[float], token_seconds: float = 0.0) -> int:
    """Return the width of the next call, 1 without a guess, for which a token costs least.

    A call of 1 + k tokens gives 1 + c_1 + c_1 c_2 + ... of them, with the chances c_1 to c_k of the guess.

    Args:
        costs: of calls.
        chances: of each token of the guess, if those before it are right.
        token_seconds: that each token of a guess takes to make.
    """
    if not chances or not costs.known:
        return 1
    single, best, gain = costs.seconds(1), 1, _WORTH_IT
    expected, likely, tokens = 1.0, 1.0, 1
    for width in WIDTHS[1:]:
        if width > len(chances) + 1:
            break
        for chance in chances[tokens - 1 : width - 1]:
            likely *= chance
            expected += likely
        tokens = width
        seconds = costs.seconds(width) + (width - 1) * token_seconds
        if expected * single / seconds > gain:
            best, gain = width, expected * single / seconds
    return best
