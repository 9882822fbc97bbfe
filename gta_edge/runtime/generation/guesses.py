"""Guesses of what comes next: a chain of tokens, or a small tree where more than one may follow the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.session import Ids
from gta_edge.runtime.step_costs import WIDTHS, StepCosts

__all__ = ["NOTHING", "TEXT", "Candidate", "Draft", "Proposer", "likeliest", "nodes_that_pay"]

State = TypeVar("State")

TEXT = -1
"""What the first tokens of a guess follow."""

_WORTH_IT = 1.02
"""What a token is to cost less for a wider call to be made: estimates are not better than that."""


class Candidate(NamedTuple):
    """A token that could be guessed.

    Attributes:
        parent: the candidate that it follows, an earlier one, or ``TEXT``.
        rank: how many candidates that follow the same come before it.
        likelihood: that it comes, and with it all that it follows.
    """

    parent: int
    rank: int
    likelihood: float


@dataclass(frozen=True)
class Draft:
    """Tokens that may come.

    Attributes:
        ids: int64 [K].
        parents: which of them each follows, an earlier one, or ``TEXT``.
        probabilities: of a draft drawn at random: by a token, the distribution float64 [V] that those which follow it
            were drawn from, one after the other and without replacement. None of one that was not drawn.
    """

    ids: Ids
    parents: Sequence[int]
    probabilities: Mapping[int, npt.NDArray[np.float64]] | None = None

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    def after(self, node: int) -> list[int]:
        """Return those that follow a token, in order."""
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def depth(self, node: int) -> int:
        """Return how many tokens lead to one, itself included."""
        found = 0
        while node != TEXT:
            node, found = self.parents[node], found + 1
        return found


NOTHING = Draft(np.zeros(0, np.int64), ())


class Proposer(Protocol):
    """Guesses what comes next."""

    def offer(self, ids: Ids, limit: int, branches: bool, least: float = 0.0) -> Sequence[Candidate]:
        """Return what could be guessed, at most ``limit`` tokens, the likeliest first and none before what it follows.

        It is called before every call of the model, also where nothing can be guessed: it learns from what came.

        Args:
            ids: every token so far, int64 [N]; they begin with those of the call before.
            limit: of tokens.
            branches: whether several may follow the same token; otherwise each follows the one before it.
            least: what the first is to be as likely as for any to be worth a wider call.
        """

    def seconds(self, chosen: Sequence[int]) -> float:
        """Return what it takes to guess some of the candidates offered last."""

    def draft(self, chosen: Sequence[int]) -> Draft:
        """Guess some of those candidates, in this order, in which each comes after what it follows.

        It may return fewer, where there are no more tokens to choose from.
        """


# --- which tokens are likely -----------------------------------------------------------------------------------------


def likeliest(
    limit: int, root: State, children: Callable[[State], Sequence[tuple[float, State]]]
) -> list[tuple[Candidate, State]]:
    """Return the likeliest tokens of a tree of what may come, the likeliest first and none before what it follows.

    The best tree of k tokens is the first k: how many of a tree's tokens come is expected to be the sum of their
    likelihoods.

    Args:
        limit: of tokens.
        root: stands for the text.
        children: returns what may follow a state: the chance of each, where none comes that is before it in the list.
            It is taken to be no likelier than those.
    """
    found: list[tuple[Candidate, State]] = []
    waiting: list[tuple[float, int, Candidate, float, Sequence[tuple[float, State]]]] = []
    order = itertools.count()

    def add(parent: int, rank: int, bound: float, left: float, options: Sequence[tuple[float, State]]) -> None:
        if rank < len(options):
            candidate = Candidate(parent, rank, min(bound, left * options[rank][0]))
            heappush(waiting, (-candidate.likelihood, next(order), candidate, left, options))

    add(TEXT, 0, 1.0, 1.0, children(root))
    while waiting and len(found) < limit:
        _, _, candidate, left, options = heappop(waiting)
        parent, rank, likelihood = candidate
        state = options[rank][1]
        found.append((candidate, state))
        add(len(found) - 1, 0, likelihood, likelihood, children(state))
        add(parent, rank + 1, likelihood, left - likelihood, options)
    return found


# --- how many of them pay --------------------------------------------------------------------------------------------


def nodes_that_pay(
    costs: StepCosts, offered: Sequence[Candidate], seconds: Callable[[Sequence[int]], float]
) -> list[int]:
    """Return which candidates to guess, so that a token costs least: a chain, a tree, or none.

    A call gives one token, and of its guess as many as the sum of the likelihoods. Its width is one of a few. Chosen
    are the likeliest tokens for it, or of the likeliest chain the first, where a tree costs more than it brings.

    Args:
        costs: of calls.
        offered: what could be guessed.
        seconds: what it takes to guess some of them.
    """
    if not offered or not costs.known:
        return []
    chain: list[int] = []
    for i, candidate in enumerate(offered):
        if candidate.rank == 0 and candidate.parent == (chain[-1] if chain else TEXT):
            chain.append(i)
    single, best, gain = costs.seconds(1), list[int](), 1.0
    for kind in (chain, list(range(len(offered)))):
        chosen, bound = best, _WORTH_IT * gain  # a tree has to beat the best chain as that has to beat no guess
        for width in WIDTHS[1:]:
            nodes = kind[: width - 1]
            if len(nodes) < width - 1:
                break
            expected = 1.0 + sum(offered[i].likelihood for i in nodes)
            taken = costs.seconds(width, tree=nodes != chain[: width - 1]) + seconds(nodes)
            if expected * single / taken > bound:
                chosen, bound = nodes, expected * single / taken
        if chosen is not best:
            best, gain = chosen, bound
    return _chains_first(best, offered)


def _chains_first(nodes: Sequence[int], offered: Sequence[Candidate]) -> list[int]:
    """Return nodes with the likeliest path first: its rows of the cache are then where those of a text are."""
    found, pending = list[int](), [TEXT]
    while pending:
        node = pending.pop()
        if node != TEXT:
            found.append(node)
        pending += sorted((i for i in nodes if offered[i].parent == node), key=lambda i: -offered[i].rank)
    return found
