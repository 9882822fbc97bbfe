"""Whether backends give the same answers: a fast wrong one must not win.

All of a bundle's backends are compared with one of them, the most exact. Compared are logits: after the prompt, and
after each of the first tokens that both chose alike; where they chose differently, what follows has other inputs.

Backends that round activations to int8, or have a quantised cache, are off by far more than those that do not. Rounding
errs by a little everywhere, and what is wrong, a layer or the tokens before, by much: so they are held to a mean error
too. What is off by less than rounding, such as two heads that changed places, shows only where the same backend is
asked not to round, as ``run`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.runtime.registry import BACKENDS

__all__ = ["Answers", "agreement", "bound", "choose_reference", "is_exact", "mean_bound"]

ROUNDED_BOUND = 2.0
"""Of a backend that rounds activations to int8 for matmuls with int8 and int4 weights: the largest difference.

Each matmul is off by half a percent then, and through the layers the largest of millions of logits is off by a tenth
of their spread (the trained example model) to half of it (54 layers of random weights). Logits of a kernel that is
wrong have nothing to do with the reference, and the largest difference is five or more times the spread.
"""

QUANTISED_CACHE_BOUNDS = {"int8": (0.5, 0.15), "fp8": (0.5, 0.15), "int4": (2.0, 0.4), "int4v2": (4.0, 0.8)}
"""More for a quantised cache, beside the bound of the type computed in: the largest difference, and the mean below.

As with ``ROUNDED_BOUND``, they tell the noise of rounding from a kernel that is wrong, which is off by several times
the spread of the logits. Of PyTorch on a CPU, in models of 2 to 30 layers, random and trained, prompts of 200 and 300
tokens and eight more, the largest difference was 0.003 to 0.19 in int8, 0.02 to 0.34 in fp8, 0.05 to 0.79 in int4 and
0.17 to 1.6 in int4v2, the mean at most 0.03, 0.04, 0.18 and 0.37. What is beyond them PyTorch judges (``judge``).
"""

ROUNDED_MEAN_BOUND = 0.15
"""Of a backend that rounds activations: the root mean square of differences, over the same spread.

Honest rounding was off by 0.01 to 0.04 in models of 2 to 54 layers, random and trained, in int8 and int4; a matrix of
one layer with its sign changed by 0.2 to 1.6, least in the last of many layers and most in the first.
"""


@dataclass(frozen=True)
class Answers:
    """What a backend said to a prompt.

    Attributes:
        logits: float32 [N, B, V]: after the prompt and after each token that it then chose.
        backend: ``torch``, ``onnxruntime``, …
        compute: type that it computes in.
        rounds: whether matmuls round activations to int8.
        quantised_cache: whether the cache holds fewer bits than are computed in.
        cache_dtype: type of cached values, where the backend says it.
    """

    logits: npt.NDArray[np.float32]
    backend: str
    compute: str
    rounds: bool = False
    quantised_cache: bool = False
    cache_dtype: str = ""


def is_exact(answers: Answers) -> bool:
    """Tell whether nothing is rounded below float32."""
    return answers.compute == "fp32" and not answers.rounds and not answers.quantised_cache


def bound(answers: Answers) -> float:
    """Return how far from the truth a backend may be, in standard deviations of the logits (``fidelity.py``)."""
    own = COMPUTE_BOUNDS[answers.compute] + _cache_bounds(answers)[0]
    return max(own, ROUNDED_BOUND) if answers.rounds else own


def mean_bound(answers: Answers) -> float:
    """Return the same of the root mean square of the differences."""
    return min(bound(answers), max(ROUNDED_MEAN_BOUND, _cache_bounds(answers)[1]))


def _cache_bounds(answers: Answers) -> tuple[float, float]:
    """Return what a quantised cache adds to both; an interpreter that does not say which has one of 8 bits."""
    if not answers.quantised_cache:
        return 0.0, 0.0
    return QUANTISED_CACHE_BOUNDS.get(answers.cache_dtype, QUANTISED_CACHE_BOUNDS["int8"])


def choose_reference(given: Mapping[Any, Answers]) -> Any:
    """Return the key of the most exact; among equals PyTorch's, which every bundle is checked against, then the first.

    One that gives no finite numbers is taken only where all do.
    """

    def rank(key: Any) -> tuple[bool, float, bool]:
        answers = given[key]
        return not np.isfinite(answers.logits).all(), bound(answers), not BACKENDS[answers.backend].reference

    return min(given, key=rank)


def agreement(answers: Answers, reference: Answers) -> dict[str, Any]:
    """Compare answers with the reference's, row by row as long as both chose the same tokens.

    Returns:
        ``agrees``; ``max_rel_error``, the largest difference over the standard deviation of the reference's logits;
        ``bound`` on it; ``mean_error`` and ``mean_bound``, the same of the root mean square; ``same_tokens`` of
        ``compared_tokens`` greedy choices, until the first difference of each row.
    """
    theirs, ours = reference.logits, answers.logits
    chosen, expected = ours.argmax(-1), theirs.argmax(-1)  # [N, B]
    errors, means, same = [], [], 0
    for row in range(theirs.shape[1]):
        differs = np.flatnonzero(chosen[:, row] != expected[:, row])
        alike = int(differs[0]) if differs.size else len(theirs)
        same += alike
        # where they first choose differently the input is still the same
        part = slice(0, min(alike + 1, len(theirs)))
        errors.append(difference(ours[part, row], theirs[part, row]).max_rel_error)
        means.append(_mean_error(ours[part, row], theirs[part, row]))
    exact = is_exact(reference)
    allowed = bound(answers) + (0.0 if exact else bound(reference))
    allowed_mean = mean_bound(answers) + (0.0 if exact else mean_bound(reference))
    return {
        "agrees": bool(max(errors) <= allowed and max(means) <= allowed_mean),
        "max_rel_error": max(errors),
        "bound": allowed,
        "mean_error": max(means),
        "mean_bound": allowed_mean,
        "same_tokens": same,
        "compared_tokens": int(expected.size),
    }


def _mean_error(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Return the root mean square of the differences of logits [N, V], over the reference's standard deviation."""
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return float("inf")
    found = float(np.sqrt(np.mean(np.square(logits - reference, dtype=np.float64))))
    spread = float(reference.std(dtype=np.float64))
    return found / spread if spread > 0 else (0.0 if found == 0 else float("inf"))
