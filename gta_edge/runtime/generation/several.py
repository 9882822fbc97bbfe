"""Which way several answers are generated, and whether it can be had."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

from gta_edge.errors import InputError
from gta_edge.plan.roofline import LARGEST_BATCH
from gta_edge.runtime.generation.answer import Answer
from gta_edge.runtime.generation.answers import Alternative, Answers, Run, in_a_tree, in_turns
from gta_edge.runtime.generation.batch import in_a_batch
from gta_edge.runtime.generation.beams import BeamSearch, in_beams
from gta_edge.runtime.generation.sampling import LARGEST_SEED, Sampler, Sampling
from gta_edge.runtime.generation.steps import StepCounts
from gta_edge.runtime.session import Ids, Session
from gta_edge.support.text import brief

__all__ = ["MAX_BEAMS", "answers_for", "check_answers", "guesses_of_several"]

MAX_BEAMS = 64
"""Answers that a search follows at once, at most."""


def check_answers(n: Any, beams: Any, length_penalty: Any, sampling: Sampling, *, has_stop_strings: bool) -> None:
    """Refuse what makes no sense of several answers, whatever the model.

    Args:
        n: how many; None for 1.
        beams: how many are followed in a search; None for no search.
        length_penalty: of a search.
        sampling: of all answers.
        has_stop_strings: whether there are any, which a search cannot heed.

    Raises:
        InputError: numbers or options that make no sense, or not together.
    """
    count = 1 if n is None else _whole("n", n, LARGEST_BATCH)
    if beams is None:
        if length_penalty != 1:
            raise InputError(f"length_penalty is {brief(length_penalty)}, and there is no search", "give beams with it")
        return
    width = _whole("beams", beams, MAX_BEAMS)
    if count > width:
        raise InputError(f"n is {count} and there are {width} beams", "give at least as many beams as answers")
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, (int, float)) or not abs(length_penalty) < 99:
        raise InputError(f"length_penalty is {brief(length_penalty)}", "expected a number, 1 by default")
    if not sampling.greedy:
        raise InputError(
            "beam search draws nothing, and temperature, top_k, top_p or min_p are given", "leave them out"
        )
    if has_stop_strings:
        raise InputError("beam search takes no stop strings", "leave them out, or leave beams out")


def answers_for(
    session: Session,
    prompt: Ids,
    new_answer: Callable[[], Answer],
    sampling: Sampling,
    *,
    n: int | None,
    beams: int | None,
    length_penalty: float,
    defaults: Mapping[str, Any],
    guesses: StepCounts | None,
) -> Answers:
    """Return the answers to a prompt, to be generated.

    What ``check_answers`` refuses has been refused.

    Args:
        session: runs the model.
        prompt: int64 [N].
        new_answer: makes one that says nothing yet.
        sampling: of all answers; each draws with a seed of its own.
        n: how many; None for 1.
        beams: how many are followed in a search; None to draw, or choose, each by itself.
        length_penalty: of a search.
        defaults: as ``Answers`` has it.
        guesses: likewise.

    Raises:
        InputError: more beams than the model has tokens, a search in a session without trees, or speculation where
            answers are no batch.
    """
    count = 1 if n is None else int(n)
    if beams is None:
        seed = secrets.randbits(63) if sampling.seed is None else int(sampling.seed)
        seeds = [(seed + i) % (LARGEST_SEED + 1) for i in range(count)]
        samplers = [Sampler(replace(sampling, seed=each), len(prompt)) for each in seeds]
        drawn = [Alternative(new_answer(), sampler) for sampler in samplers]
        return Answers(session, prompt, drawn, _way_of(session, guesses), defaults, guesses)
    if guesses is not None:
        raise InputError("a search guesses nothing, and speculation was asked for", "leave one of both out")
    width = _whole("beams", beams, min(MAX_BEAMS, session.config.vocab_size))  # which begin with different tokens
    if not session.trees:
        raise InputError("beams are branches of a tree, and the session was loaded without", "load it with trees=True")
    found = [Alternative(new_answer(), None) for _ in range(count)]
    search = BeamSearch(
        width,
        end_token_ids=found[0].answer.end_token_ids,
        max_new_tokens=found[0].answer.max_new_tokens,
        length_penalty=float(length_penalty),
    )
    return Answers(session, prompt, found, in_beams(search, Sampler(sampling, len(prompt))), defaults)


def guesses_of_several(speculate: str | None, draft: Session | None) -> StepCounts | None:
    """Return what is told of guesses in several texts; None where nothing is guessed.

    Raises:
        InputError: a way of speculation that there is not, or is for one text.
    """
    if draft is not None or speculate == "draft":
        raise InputError("a draft model is for one answer, and several were asked for", "take speculate='lookup'")
    if speculate not in (None, "off", "lookup"):
        raise InputError(f"speculate is {brief(speculate)}", "expected 'lookup' or 'off' for several answers")
    return StepCounts() if speculate == "lookup" else None


def _way_of(session: Session, guesses: StepCounts | None) -> Run:
    """Return how several answers are generated: each way reads the prompt once, if the session can."""
    if not session.trees and session.copies_rows and session.max_batch != 1:
        return partial(in_a_batch, guesses=guesses)
    if guesses is not None:
        if session.trees:
            raise InputError(
                "answers are branches of a tree here, of which none is guessed",
                "leave speculation out, or load without trees=True, an engine that was not built for trees",
            )
        raise InputError("tokens of several answers are guessed in a batch, and the session runs none", "leave n out")
    return in_a_tree if session.trees else in_turns


def _whole(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= most:
        raise InputError(f"{name} is {brief(value)}", f"expected a whole number from 1 to {most}")
    return int(value)
