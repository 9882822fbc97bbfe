"""Models, costs and guesses that the tests of speculation share."""

import itertools
from dataclasses import dataclass, field

import numpy as np

from gta_edge.runtime.generation.guesses import TEXT, Candidate, Draft
from gta_edge.runtime.generation.sampling import Sampler, Sampling
from gta_edge.runtime.step_costs import WIDTHS, StepCosts


def table(seed, tokens=12, spread=2.0):
    return (spread * np.random.default_rng(seed).standard_normal((tokens,) * 3)).astype(np.float32)


def probabilities_of_three(table, prompt, options):
    """Return how likely each answer of three tokens is behind a prompt, [V, V, V], by a table of logits [V, V, V]."""
    sampler, found = Sampler(Sampling(**options)), np.zeros_like(table, dtype=float)
    for answer in itertools.product(range(len(table)), repeat=3):
        ids, probability = np.array([*prompt, *answer]), 1.0
        for n in range(len(prompt), len(ids)):
            probability *= sampler.probabilities(table[ids[n - 2], ids[n - 1]], ids[:n])[ids[n]]
        found[answer] = probability
    return found


def nothing(chosen):
    """What guesses take that take nothing."""
    return 0.0


def costs_of(slope):
    """Costs of calls of which each token beyond the first takes ``slope`` of it."""
    costs = StepCosts()
    for width in WIDTHS * 2:
        costs.add(width, 1 + slope * (width - 1))
    return costs


class FixedCosts(StepCosts):
    """Costs that do not depend on this machine."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    known = True

    def seconds(self, width, *, tree=False):
        return 1 + self.slope * (width - 1)


def with_costs(session, slope=0.01):
    session.step_costs = FixedCosts(slope)
    return session


def chain(chances):
    """Candidates that follow each other."""
    return [Candidate(i - 1, 0, likelihood) for i, likelihood in enumerate(np.cumprod(chances))]


@dataclass
class Oracle:
    """Guesses that are what comes, with some that are not."""

    answer: list[int]
    prompt: int
    wrong_every: int
    ids: list[int] = field(default_factory=list)

    def offer(self, ids, limit, branches, least=0.0):
        self.ids = ids.tolist()
        return chain([0.99] * limit)

    def seconds(self, chosen):
        return 0.0

    def draft(self, chosen):
        at = len(self.ids) - self.prompt
        places = range(at, min(at + len(chosen), len(self.answer)))
        tokens = np.array([self.answer[i] ^ (i % self.wrong_every == 1) for i in places], np.int64)
        return Draft(tokens, range(-1, len(tokens) - 1))


class TreeOracle(Oracle):
    """Of each token two guesses, the first of them wrong; what follows the second is right too, in places."""

    def offer(self, ids, limit, branches, least=0.0):
        self.ids = ids.tolist()
        return [Candidate(i - 1, 0, 0.9) for i in range(limit if branches else 0)]

    def draft(self, chosen):
        at, tokens, parents, node = len(self.ids) - self.prompt, [], [], TEXT
        for i, right in enumerate(self.answer[at : at + len(chosen) // 2], at):
            tokens += [(right + 1) % 64, (right + 2) % 64 if i % self.wrong_every == 1 else right]
            parents += [node, node]
            node = len(tokens) - 1
        return Draft(np.array(tokens, np.int64), parents)


def chi_square(counts, probabilities):
    """Return the statistic and its degrees of freedom; what cannot be must not have been."""
    possible, draws = probabilities > 0, counts.sum()
    assert not counts[~possible].any()
    expected = draws * probabilities[possible]
    return ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
