"""Beam search: the most probable answers, as far as a few that are followed at once show them.

What is followed, what ends and when the search is over are those of transformers' ``generate`` with ``num_beams`` and
its defaults (``early_stopping=False``). An answer's score is the sum of its tokens' log probabilities, over their
number to the power of ``length_penalty``: above 0 it favours long answers. The beams are branches of a tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.generation.answers import Alternative, Piece, Run, prune
from gta_edge.runtime.generation.sampling import Sampler
from gta_edge.runtime.session import Ids, Session
from gta_edge.runtime.token_tree import PREFIX

__all__ = ["Beam", "BeamSearch", "in_beams"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Beam:
    """The beginning of an answer, or a whole one.

    Attributes:
        ids: its tokens.
        score: the sum of their log probabilities; of a whole one, over their number to the power of the penalty.
    """

    ids: tuple[int, ...]
    score: float


class BeamSearch:
    """Which answers are followed and which are found, without a model.

    Args:
        beams: answers that are followed at once.
        end_token_ids: tokens that end an answer, and are counted among its tokens.
        max_new_tokens: an answer of so many ends.
        length_penalty: see there.

    Attributes:
        running: the beams to follow, the most probable first.
        finished: the best answers, the best first; at most as many as beams.
        done: whether the search is over.
    """

    def __init__(
        self, beams: int, *, end_token_ids: frozenset[int], max_new_tokens: int, length_penalty: float = 1.0
    ) -> None:
        self.running = [Beam((), 0.0)]
        self.finished: list[Beam] = []
        self.done = False
        self._beams, self._ends, self._most, self._penalty = beams, end_token_ids, max_new_tokens, length_penalty
        self._candidates = max(2, 1 + len(end_token_ids)) * beams

    def step(self, log_probabilities: Sequence[Floats]) -> list[int]:
        """Take log probabilities [V] of what comes after each running beam; return each new one's place among them."""
        totals = np.concatenate(
            [beam.score + after for beam, after in zip(self.running, log_probabilities, strict=True)]
        )  # [R V]
        count, vocabulary = min(self._candidates, len(totals)), len(log_probabilities[0])
        best = np.argpartition(-totals, count - 1)[:count]
        best = best[np.lexsort((best, -totals[best]))]
        length = len(self.running[0].ids) + 1
        running, places = list[Beam](), list[int]()
        found = list(self.finished)
        for rank, index in enumerate(best.tolist()):
            place, token = divmod(index, vocabulary)
            beam = Beam((*self.running[place].ids, token), float(totals[index]))
            if token in self._ends or length == self._most:
                if rank < self._beams:
                    found.append(Beam(beam.ids, beam.score / length**self._penalty))
            elif len(running) < self._beams:
                running.append(beam)
                places.append(place)
        self.finished = sorted(found, key=lambda beam: -beam.score)[: self._beams]
        self.running = running
        self.done = not running or (
            len(self.finished) == self._beams and running[0].score / length**self._penalty <= self.finished[-1].score
        )
        return places


def in_beams(search: BeamSearch, sampler: Sampler) -> Run:
    """Return what generates the best answers that a search finds, all of them when it is over.

    Args:
        search: that has not begun.
        sampler: its biases and penalties are applied to log probabilities, as transformers does.
    """

    def run(session: Session, prompt: Ids, answers: Sequence[Alternative]) -> Iterator[Piece | None]:
        claim = session.claim()
        logits = claim.forward(prompt[None])
        yield None
        tree, nodes = claim.tree(), [PREFIX]
        while True:
            running = [np.array([*prompt, *beam.ids], np.int64) for beam in search.running]
            places = search.step([sampler.log_probabilities(*each) for each in zip(logits, running, strict=True)])
            if search.done:
                break
            parents = [nodes[place] for place in places]
            before, nodes = nodes, tree.grow(parents)
            prune(tree, set(before).difference(parents))
            logits = claim.forward([[beam.ids[-1] for beam in search.running]], tree=tree, all_logits=True)[0]
            yield None
        tree.close()
        for i, (each, beam) in enumerate(zip(answers, search.finished, strict=False)):
            each.score = beam.score
            yield i, "".join([each.answer.take(token) for token in beam.ids])

    return run
