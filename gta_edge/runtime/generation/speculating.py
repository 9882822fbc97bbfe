"""Which way of speculation was asked for, and whether it can be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from gta_edge.errors import InputError
from gta_edge.runtime.generation.draft_model import DraftModel
from gta_edge.runtime.generation.guesses import Proposer
from gta_edge.runtime.generation.lookup import PromptLookup
from gta_edge.runtime.generation.sampling import Sampler
from gta_edge.runtime.generation.speculation import SpeculativeSteps
from gta_edge.runtime.generation.steps import PlainSteps, Steps
from gta_edge.runtime.session import Claim, Session, checked_session
from gta_edge.support.choices import unknown

__all__ = ["Speculate", "steps_for"]

Speculate = Literal["lookup", "draft", "off"]


def steps_for(
    session: Session,
    speculate: str | None,
    draft: Session | None,
    sampler: Sampler,
    prompt_tokens: int,
    max_new_tokens: int,
    claim: Callable[[], Claim],
) -> Steps:
    """Return where the logits of a generation come from.

    Args:
        session: runs the model.
        speculate: as ``generate`` takes it, as the next one.
        draft: runs the draft model.
        sampler: of the generation; guesses are chosen with its options.
        prompt_tokens: of the prompt.
        max_new_tokens: of the answer.
        claim: returns the right to the session's cache.

    Raises:
        InputError: a way that there is not, a draft model that is missing, of no use or of another tokenizer, or a
            cache that cannot take tokens back.
    """
    if speculate is None:
        speculate = "off" if draft is None else "draft"
    if speculate not in get_args(Speculate):
        raise InputError(*unknown("speculate is {}; expected one of {}", speculate, get_args(Speculate)))
    if (speculate == "draft") != (draft is not None):
        given = "no draft model" if draft is None else "a draft model"
        raise InputError(
            f"speculate is {speculate!r} with {given}", "give draft= with speculate 'draft', and only then"
        )
    if speculate == "off":
        return PlainSteps(claim)
    proposer: Proposer = PromptLookup()
    if draft is not None:
        _check_draft(session, draft)
        vocabulary = session.config.vocab_size
        proposer = DraftModel(draft, _of_the_draft(sampler, prompt_tokens), vocabulary)
    # a prompt that fills all positions still has logits for one token more
    total = min(prompt_tokens + max_new_tokens, session.max_length + 1)
    return SpeculativeSteps(session, proposer, total, claim)


def _of_the_draft(sampler: Sampler, prompt_tokens: int) -> Sampler:
    """Return a sampler with the same options and draws of its own, which follow from the seed."""
    state = np.random.SeedSequence([sampler.seed, 1]).generate_state(1, np.uint64)
    return Sampler(replace(sampler.sampling, seed=int(state[0] >> np.uint64(1))), prompt_tokens)


def _check_draft(session: Session, draft: Session) -> None:
    """Refuse a draft model whose ids mean something else."""
    if checked_session(draft, "the draft model") is session:
        raise InputError("the draft model is the model itself", "load a smaller bundle for it")
    ours, its = session.tokenizer, draft.tokenizer
    if ours is None and its is None:
        sizes = session.config.vocab_size, draft.config.vocab_size
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the draft model has {sizes[1]} token ids and the model {sizes[0]}",
                "take a draft model with the same tokenizer",
            )
        return
    if ours is None or its is None:
        raise InputError(
            f"the {'model' if ours is None else 'draft model'} has no tokenizer, so it cannot be told whether both "
            "have the same",
            "export the checkpoint again with its tokenizer.json",
        )
    if not ours.has_ids_of(its):
        raise InputError(
            "the draft model has another tokenizer than the model", "take a draft model with the same tokenizer"
        )
