"""Where two backends disagree: whether what one answered is as near to the truth as its arithmetic allows.

At an ill-conditioned position two right backends may be further apart than any fixed bound. PyTorch tells: it computes
the tokens in float64, and in the backend's own arithmetic, and so what a right answer may be off by at each position.
That takes long, and is done only then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.probes import Probe
from gta_edge.accuracy.tolerance import allowance, compare
from gta_edge.errors import GtaEdgeError
from gta_edge.evaluate.bench.agreement import Answers
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.optional import installed, optional
from gta_edge.numerics.dtypes import QUANTIZED_CACHE_TYPES

__all__ = ["judged"]

_MAX_FLOPS = 2e12  # of a prompt, in one arithmetic: a minute or two on few cores


def judged(
    bundle: Bundle, prompt: npt.NDArray[np.int64], answers: Answers, reference: Answers, found: dict[str, Any]
) -> dict[str, Any]:
    """Return what was found of answers that disagree with the reference's, judged by PyTorch where it is here.

    Args:
        bundle: the model.
        prompt: ids [B, T].
        answers: to it.
        reference: the most exact backend's.
        found: by ``agreement``. Where PyTorch finds the answers right, ``agrees`` is true, and the bounds are the
            widest of those at the positions compared.
    """
    if found["agrees"] or not installed(optional("torch", "export")):
        return found
    if prompt.size * bundle.config.flops_per_token(prompt.shape[1]) > _MAX_FLOPS:
        return found
    from gta_edge.accuracy.expected import arithmetic_of, expected_at_end

    chosen, theirs = answers.logits.argmax(-1), reference.logits.argmax(-1)  # [N, B]
    probes, given = [], []
    for row, ids in enumerate(prompt):
        differs = np.flatnonzero(chosen[:, row] != theirs[:, row])
        count = min(int(differs[0]) + 1 if differs.size else len(chosen), len(chosen))
        tokens = np.concatenate([ids, chosen[: count - 1, row]]).astype(np.int64)
        probes.append(Probe(f"row {row}", tokens[None], len(ids)))
        given.append(answers.logits[:count, row])
    cache = answers.cache_dtype if answers.cache_dtype in QUANTIZED_CACHE_TYPES else None
    try:
        arithmetic = arithmetic_of(bundle, answers.compute, cache, rounds=answers.rounds)
        expected = expected_at_end(bundle, probes, [len(logits) for logits in given], arithmetic)
    except GtaEdgeError:  # no memory for it, a bundle that is replaced meanwhile: what was found stands
        return found
    floor, factor = allowance(answers.compute, rounds=answers.rounds or cache is not None)
    if not compare(given, expected, floor, factor).bound_fraction <= 1:
        return found
    widest = max(float(np.maximum(floor, factor * each.distance).max()) for each in expected)
    bounds = {name: max(found[name], widest, found[of]) for name, of in _BOUNDS.items()}
    return found | bounds | {"agrees": True}


_BOUNDS = {"bound": "max_rel_error", "mean_bound": "mean_error"}
