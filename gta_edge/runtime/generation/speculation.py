"""Speculative decoding: tokens that are likely to come are run together with the one that has come.

The model gives logits for all of them at once, and while the tokens that are then chosen follow the guess, the logits
for the next ones are there already. Nothing else changes: tokens are chosen one by one, in order, from the model's
logits. So what is generated is what would be generated without it; of a guess drawn at random, see ``Sampler.sample``
(arXiv 2211.17192, 2302.01318).

A guess is a chain of tokens, which any session runs, or in a session that was loaded with trees a small tree of them,
of which the path that comes is accepted (arXiv 2305.09781, 2402.12374). How many are guessed, and which, is decided
anew for each call, by how often guesses came true lately and by what a wider call costs in this session; where
guessing does not pay, nothing is guessed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from gta_edge.errors import CapacityError
from gta_edge.runtime.generation.guesses import NOTHING, TEXT, Draft, Proposer, nodes_that_pay
from gta_edge.runtime.generation.sampling import Guess
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.session import Claim, Ids, Logits, Session
from gta_edge.runtime.step_costs import WIDTHS
from gta_edge.runtime.token_tree import PREFIX, TokenTree

__all__ = ["SpeculativeSteps"]


class SpeculativeSteps:
    """Runs the prompt, and then each token with a guess of those that follow.

    Args:
        session: what runs the model; with trees a guess may be one.
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
        self._wanted = 0  # ids of the last call of ``after``
        self._start = 0  # tokens before the draft
        self._draft = NOTHING
        self._at = TEXT  # the last of the draft that has come
        self._logits: Logits = np.zeros((0, 0), np.float32)  # [1 + K, V]: before the draft, and after each of it
        self._tree: TokenTree | None = None
        self._nodes: list[int] = []  # of a draft that is a tree: the node before it, and its own
        self._width, self._seconds = 0, 0.0  # tokens of the call for it, and what it took

    @property
    def guess(self) -> Guess | None:
        following, drawn = self._draft.after(self._at), self._draft.probabilities
        if drawn is None or not following:
            return None
        return Guess([int(self._draft.ids[i]) for i in following], drawn[self._at])

    def after(self, ids: Ids) -> Logits:
        came, self._wanted = ids[self._wanted :], len(ids)
        while len(came) and self._follow(int(came[0])):
            came = came[1:]
        if self._claim is None:
            self._claim = self._begin()
            self._read(self._claim, ids)
        elif len(came):
            self._keep(self._claim)
            self._run(self._claim, ids, came)
        logits: Logits = self._logits[1 + self._at]
        return logits

    def settle(self) -> None:
        if self._claim is not None:
            self._keep(self._claim)

    def _follow(self, token: int) -> bool:
        """Go on to what was guessed to follow, where it is this token."""
        for node in self._draft.after(self._at):
            if self._draft.ids[node] == token:
                self._at = node
                self._counts.accepted += 1
                return True
        return False

    def _keep(self, claim: Claim) -> None:
        """Leave in the cache what has come of the draft, and nothing else of it."""
        come = self._draft.depth(self._at)
        if self._nodes:
            assert self._tree is not None  # these are its nodes
            started = time.perf_counter()
            claim.accept(self._tree, self._nodes[1 + self._at], close=True)
            self._seconds += time.perf_counter() - started
            self._session.step_costs.add(self._width, self._seconds, tree=True)
        elif come < len(self._draft.ids):
            claim.truncate(self._start + come)
        self._start += come
        self._draft, self._at, self._nodes = NOTHING, TEXT, []

    def _room(self, ids: Ids) -> int:
        """Return how many tokens can be guessed: no more than are asked for, and than the cache can take back."""
        limit = min(WIDTHS[-1], self._total - len(ids)) - 1
        revocable = self._session.revocable()
        return max(0, limit if revocable is None else min(limit, revocable))

    def _read(self, claim: Claim, ids: Ids) -> None:
        """Run the prompt, behind which nothing is guessed: of a long one only the last logits are computed."""
        self._proposer.offer(ids, 0, branches=False)  # it learns
        self._logits = claim.forward(ids[None])
        self._start = len(ids)

    def _run(self, claim: Claim, ids: Ids, came: Ids) -> None:
        """Run what came, and a guess after it."""
        costs = self._session.step_costs
        room = self._room(ids) if costs.known and not costs.due else 0
        branches = self._session.trees and len(came) + room + 1 <= self._session.tree_room()
        offered = self._proposer.offer(ids, room, branches, costs.least_of_a_token() if room else 0.0)
        chosen = nodes_that_pay(costs, offered, self._proposer.seconds)
        self._draft = self._proposer.draft(chosen) if chosen else NOTHING
        try:
            logits = self._run_draft(claim, came)
        except CapacityError:  # which what is guessed may be too much for
            if not len(self._draft.ids) or not claim.holds:
                raise
            self._draft, self._nodes = NOTHING, []
            logits = self._run_draft(claim, came)
        self._logits, self._start = logits[len(came) - 1 :], len(ids)
        self._counts.calls += 1
        self._counts.drafted += len(self._draft.ids)

    def _run_draft(self, claim: Claim, came: Ids) -> Logits:
        """Run what came and the draft; return the logits of all of it, [T, V]."""
        started, tokens = time.perf_counter(), np.concatenate([came, self._draft.ids])
        if self._draft.is_chain:
            logits: Logits = claim.forward(tokens[None], all_logits=True)[0]
            self._session.step_costs.add(len(tokens), time.perf_counter() - started)
        else:
            logits = self._run_tree(claim, self._draft, tokens)
            self._width, self._seconds = len(tokens), time.perf_counter() - started
        return logits

    def _run_tree(self, claim: Claim, draft: Draft, tokens: Ids) -> Logits:
        """Run what came as the beginning of a tree, and a draft that is one behind it."""
        if self._tree is None or self._tree.closed:
            self._tree = claim.tree()
        before, first = len(tokens) - len(draft.ids), self._tree.next
        chain = [PREFIX, *range(first, first + before - 1)]
        nodes = self._tree.grow([*chain, *(first + before + parent for parent in draft.parents)])
        self._nodes = nodes[before - 1 :]
        logits: Logits = claim.forward(tokens[None], tree=self._tree, all_logits=True)[0]
        return logits
