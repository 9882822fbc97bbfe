"""The stage of calls of a few tokens on the backend ``torch``: what each width takes, and what guessing saves.

    python -m scripts.gpu_stages.widths gta-1b/int4 ...

A call of 16 tokens reads the weights once, as one of a single token does. What it takes beside that is what speculation
pays; without a graph it would be the launches. Weights are random, so the text soon repeats itself, which is what
prompt lookup is for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_models import random_session

from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.step_costs import WIDTHS
from gta_edge.runtime.torch.session import TorchSession
from scripts.gpu_stages.figures import REHEARSAL, tell
from scripts.gpu_stages.models import CONTEXTS, DEVICE, config_of

__all__: list[str] = []

_CONTEXT = CONTEXTS[1]
_CALLS = 2 if REHEARSAL else 12
_NEW_TOKENS = 6 if REHEARSAL else 192


def main(model: str) -> None:
    """Tell what a call of each width takes as a graph and without, and a token of a text with guesses and without.

    Args:
        model: a preset and the type of its weights, with a slash between.
    """
    name, _, precision = model.partition("/")
    with random_session(config_of(name), precision, DEVICE) as (session, _):
        ids = np.resize(np.arange(3, 11), (1, _CONTEXT))
        session.forward(ids)
        single = 0.0
        for width in WIDTHS:
            before = 0 if REHEARSAL else torch.cuda.memory_reserved()
            seconds = _seconds(session, width)
            single = single or seconds
            grown = 0 if REHEARSAL else torch.cuda.memory_reserved() - before
            refused, session.graph_refused = session.graph_refused, "measured without"
            eager = _seconds(session, width)
            session.graph_refused = refused
            figures = {"ms": 1e3 * seconds, "ms_eager": 1e3 * eager, "of_single": seconds / single}
            tell("width", model=model, context=_CONTEXT, width=width, **figures, graph_MiB=grown / 2**20)
        prompt = ids[0, : _CONTEXT // 2].tolist()
        for speculate in ("off", "lookup") * 2:  # each once to warm up
            answer = _timed(lambda speculate=speculate: _answer(session, prompt, speculate))
            tell("speculation", model=model, speculate=speculate, **answer)


def _seconds(session: TorchSession, width: int) -> float:
    """Return what a call takes that all logits of are wanted, after one that may capture it."""
    given, found = np.full((1, width), 5), []
    for _ in range(_CALLS + 1):
        start = time.perf_counter()
        session.forward(given, all_logits=True)
        found.append(time.perf_counter() - start)
        session.truncate(_CONTEXT)
    return median(found[1:])


def _timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    found = run()
    return found | {"seconds": time.perf_counter() - start}


def _answer(session: TorchSession, prompt: list[int], speculate: Any) -> dict[str, Any]:
    generation = generate(
        session, prompt, max_new_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True, speculate=speculate
    )
    for _ in generation:
        pass
    timings = generation.timings
    return {"ms_per_token": timings.get("tpot_ms"), "tokens_per_step": timings.get("tokens_per_step")}


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
