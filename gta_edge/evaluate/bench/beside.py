"""What is timed beside plain decoding: tokens that are guessed ahead, and several answers to one prompt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.generation.lookup import PromptLookup
from gta_edge.runtime.generation.speculation import SpeculativeSteps
from gta_edge.runtime.session import Session
from gta_edge.runtime.token_tree import PREFIX

__all__ = ["BESIDE", "answered", "speculated", "summarise_beside"]

Ids = npt.NDArray[np.int64]
Document = dict[str, Any]

BESIDE = ("speculation", "answers")
"""Keys of a round, and of a row of the report, that are there where it was asked for."""


def speculated(session: Session, prompt: Ids, new_tokens: int) -> Document:
    """Time greedy decoding with prompt lookup behind a prompt [1, T], which is read again."""
    context = prompt.shape[1]
    ids = np.concatenate([prompt[0], np.zeros(new_tokens, np.int64)])
    steps = SpeculativeSteps(session, PromptLookup(), context + new_tokens + 1)
    ids[context] = steps.after(ids[:context]).argmax()
    start = time.perf_counter()
    for count in range(context + 1, context + new_tokens + 1):
        token = steps.after(ids[:count]).argmax()
        if count < len(ids):
            ids[count] = token
    seconds, counts = time.perf_counter() - start, steps.counts
    assert counts is not None  # of speculative steps
    return {"ms": 1e3 * seconds, "calls": counts.calls, "drafted": counts.drafted, "accepted": counts.accepted}


def answered(session: Session, prompt: Ids, new_tokens: int, answers: int) -> Document:
    """Time answers to a prompt [1, T] as branches, each with tokens of its own; the prompt is read again."""
    claim = session.claim()
    first = int(claim.forward(prompt).argmax())
    tree, nodes, steps = claim.tree(), [PREFIX] * answers, list[float]()
    tokens = (first + np.arange(answers)) % session.config.vocab_size
    for _ in range(new_tokens):
        start = time.perf_counter()
        nodes = tree.grow(nodes)
        tokens = claim.forward(tokens[None], tree=tree, all_logits=True)[0].argmax(-1)
        steps.append(1e3 * (time.perf_counter() - start))
    return {"steps_ms": steps, "cache_bytes": session.cache_bytes}


def summarise_beside(rounds: Sequence[Document], new_tokens: int, asked_answers: int) -> Document:
    """Return the entries of a row for what was timed beside plain decoding in every round."""
    found: Document = {}
    plain = [statistics.fmean(each["steps_ms"]) for each in rounds]
    if all("speculation" in each for each in rounds):
        own = [each["speculation"] for each in rounds]
        per_token = [each["ms"] / new_tokens for each in own]
        found["speculation"] = {
            "tpot_ms": statistics.median(per_token),
            "tokens_per_step": new_tokens / own[-1]["calls"],
            "drafted": own[-1]["drafted"],
            "accepted": own[-1]["accepted"],
            "speed": statistics.median(a / b for a, b in zip(plain, per_token, strict=True)),
        }
    if all("answers" in each for each in rounds):
        steps = [statistics.fmean(each["answers"]["steps_ms"]) for each in rounds]
        found["answers"] = {
            "n": asked_answers,
            "step_ms": statistics.median(steps),
            "tokens_per_s": 1e3 * asked_answers / statistics.median(steps),
            "cache_bytes": max(each["answers"]["cache_bytes"] for each in rounds),
            "speed": statistics.median(asked_answers * a / b for a, b in zip(plain, steps, strict=True)),
        }
    return found
