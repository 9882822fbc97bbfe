"""Several answers to one prompt, which is read once and held once."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from gta_edge.errors import InputError
from gta_edge.runtime.generation.answer import Answer, FinishReason
from gta_edge.runtime.generation.sampling import Sampler
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.session import Claim, Ids, Logits, Session
from gta_edge.runtime.token_tree import PREFIX, TokenTree
from gta_edge.support.exclusive import Exclusive

__all__ = ["Alternative", "Answers", "Run", "in_a_tree", "in_turns", "prune"]

Piece = tuple[int, str]
"""Which answer, and what it goes on with."""

Run = Callable[[Session, Ids, Sequence["Alternative"]], Iterator[Piece | None]]
"""Generates all answers; None after each call of the model."""


class Alternative:
    """One of several answers.

    Args:
        answer: what it says.
        sampler: chooses its tokens; None of those that are searched for.

    Attributes:
        score: of a search, the sum of the tokens' log probabilities over a power of their number; None of a draw.
    """

    def __init__(self, answer: Answer, sampler: Sampler | None) -> None:
        self.answer, self.sampler = answer, sampler
        self.score: float | None = None

    @property
    def ids(self) -> list[int]:
        """Its tokens; see ``Generation``."""
        return self.answer.ids

    @property
    def text(self) -> str | None:
        """Its text so far, None without a tokenizer."""
        return self.answer.text

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; see ``Generation``."""
        return self.answer.finish_reason

    @property
    def seed(self) -> int | None:
        """Of its draws: ``generate`` with this seed and without ``n`` gives the same answer. None of a search."""
        return None if self.sampler is None else self.sampler.seed

    def advance(self, logits: Logits) -> str:
        """Choose the next token by its logits [V], and return the text that is now certain."""
        assert self.sampler is not None  # a search chooses otherwise
        return self.answer.take(self.sampler.sample(logits, self.answer.all_ids))


class Answers(Iterator[tuple[int, str]]):
    """Several answers in the making. Iterating gives pairs: the number of an answer, and the next piece of its text.

    Made by ``generate`` with ``n`` or ``beams``; iterating runs the session, which nothing else may use meanwhile.
    Everything here can be read at any time.

    Attributes:
        answers: what there is of each.
        prompt_tokens: tokens of the prompt.
        defaults: options that were taken from the model's ``generation_config.json``.
    """

    def __init__(
        self,
        session: Session,
        prompt: Ids,  # [N]
        answers: Sequence[Alternative],
        run: Run,
        defaults: Mapping[str, Any],
        guesses: StepCounts | None = None,
    ) -> None:
        self.answers = list(answers)
        self._guesses = guesses
        self.prompt_tokens = len(prompt)
        self.defaults = dict(defaults)
        self._calls = Exclusive("the answers", "ask for their pieces from one place")
        self._events = run(session, prompt, self.answers)
        self._first_seconds: float | None = None
        self._seconds = 0.0
        self._steps = 0

    @property
    def timings(self) -> dict[str, float | None]:
        """Figures as those of ``Generation``, of all answers together: ``tpot_ms`` and ``decode_tokens_per_s`` count
        every answer's tokens; ``tokens_per_step`` is how many of them a call of the model gave, None of a search.
        """
        first, rest = self._first_seconds, self._seconds - (self._first_seconds or 0.0)
        tokens = sum(len(each.ids) for each in self.answers) - len(self.answers)
        decoded = first is not None and tokens > 0 and rest > 0
        drawn = decoded and self.answers[0].seed is not None and self._steps > 1
        return {
            "ttft_ms": None if first is None else 1e3 * first,
            "tpot_ms": 1e3 * rest / tokens if decoded else None,
            "prompt_tokens_per_s": None if first is None else self.prompt_tokens / first,
            "decode_tokens_per_s": tokens / rest if decoded else None,
            "total_ms": 1e3 * self._seconds,
            "drafted": None if self._guesses is None else self._guesses.drafted,
            "accepted": None if self._guesses is None else self._guesses.accepted,
            "tokens_per_step": tokens / (self._steps - 1) if drawn else None,
        }

    def close(self) -> None:
        """Stop here; answers that have not ended are ``interrupted``. A step that runs is waited for."""
        if not self._calls.mine:
            with self._calls.held(wait=True):
                self._end("interrupted")
        else:  # a signal handler in the middle of a step
            self._end("interrupted")

    def __next__(self) -> Piece:
        """Return the next piece of an answer.

        Raises:
            StopIteration: all answers are complete.
            InputError: something else used the session meanwhile, or another thread asks for a piece too.
            BackendError: the model failed, the session is closed, or the logits are NaN.
            KeyboardInterrupt: as it came, with all answers up to there.
        """
        with self._calls.held():
            found = self._next_piece()
        if found is None:
            raise StopIteration
        return found

    def _next_piece(self) -> Piece | None:
        started = time.perf_counter()
        try:
            for event in self._events:
                if event is not None:
                    return event
                self._steps += 1
                if self._first_seconds is None:
                    self._first_seconds = self._seconds + time.perf_counter() - started
            return None
        except BaseException as error:
            self._end("interrupted" if isinstance(error, KeyboardInterrupt) else "error")
            raise
        finally:
            self._seconds += time.perf_counter() - started

    def _end(self, reason: FinishReason) -> None:
        for each in self.answers:
            each.answer.finish(reason)
        self._events = iter(())


def in_a_tree(session: Session, prompt: Ids, answers: Sequence[Alternative]) -> Iterator[Piece | None]:
    """Generate all answers at once, each a branch; those that have said the same so far are one branch."""
    claim = session.claim()
    logits = claim.forward(prompt[None])
    yield None
    tree = claim.tree()
    at = dict.fromkeys(range(len(answers)), (PREFIX, logits[0]))  # each answer's node, and the logits after it
    while at:
        nodes: dict[tuple[int, int], list[int]] = {}  # answers by their node and what comes after it
        for i, (node, after) in at.items():
            piece = answers[i].advance(after)
            if answers[i].finish_reason is None:
                nodes.setdefault((node, answers[i].ids[-1]), []).append(i)
            yield i, piece
        if not nodes:
            break
        parents = [node for node, _ in nodes]
        new = tree.grow(parents)
        prune(tree, {node for node, _ in at.values()}.difference(parents))
        found = claim.forward([[token for _, token in nodes]], tree=tree, all_logits=True)[0]
        yield None
        at = {i: (node, found[j]) for j, node in enumerate(new) for i in list(nodes.values())[j]}
    tree.close()


def prune(tree: TokenTree, leaves: Collection[int]) -> None:
    """Drop branches that have ended, by their last nodes."""
    ended = [node for node in leaves if node != PREFIX]
    if ended:
        tree.prune(ended)


def in_turns(session: Session, prompt: Ids, answers: Sequence[Alternative]) -> Iterator[Piece | None]:
    """Generate one answer after another, each behind the prompt that is in the cache."""
    claim = session.claim()
    first = claim.forward(prompt[None])[0]
    yield None
    for i, each in enumerate(answers):
        if i:
            _back_to(session, claim, prompt)
        logits = first
        while True:
            piece = each.advance(logits.copy())
            yield i, piece
            if each.finish_reason is not None:
                break
            logits = claim.forward([each.ids[-1:]])[0]
            yield None


def _back_to(session: Session, claim: Claim, prompt: Ids) -> None:
    """Leave the prompt in the cache, as it was read; where an answer has changed it, read it again."""
    try:
        undone = session.revocable() is None
    except InputError:  # a policy has seen the answer's attention
        undone = False
    if undone:
        claim.truncate(len(prompt))
    else:
        claim.reset()
        claim.forward(prompt[None])
