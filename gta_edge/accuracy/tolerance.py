"""How close logits are to the reference, and how close they must be at each position.

The reference is the PyTorch model in float64, with the bundle's own weights, so that a wrong graph shows in every
precision. What a right implementation is off by depends on the position: where a layer's output nearly cancels what it
is added to, every rounding error is hundreds of times as large as elsewhere. How much that is, PyTorch itself shows
when it computes in the same type as the backend. So a backend may be off by a few times what PyTorch is off by at that
position, or by a fixed bound if that is more. Needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.probes import Probe

__all__ = [
    "COMPUTE_BOUNDS",
    "FLOAT32_BOUND",
    "ROUNDED_BOUND",
    "Difference",
    "Expected",
    "Quantisation",
    "Report",
    "allowance",
    "compare",
    "difference",
    "quantisation",
]

COMPUTE_BOUNDS: dict[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}
"""``max_rel_error`` that a backend that computes in this type may have at any position."""

FLOAT32_BOUND = COMPUTE_BOUNDS["fp32"]

ROUNDED_BOUND = 2e-2
"""The same of a backend that rounds activations to int8, or cached values; what PyTorch is off by is mostly more."""

FACTORS: dict[str, float] = {"fp32": 16.0, "fp16": 6.0, "bf16": 6.0}
"""How many times PyTorch's own error at a position a backend may be off there.

In float32 the error is of the order in which sums are made, which differs from one library to the next. The narrower
types round where PyTorch does, so that errors have one size.
"""

ROUNDED_FACTOR = 5.0
"""The same where activations are rounded to 8 bits, or cached values to those or fewer."""


def allowance(compute: str, *, rounds: bool = False) -> tuple[float, float]:
    """Return what a backend may be off by at any position, and how many times PyTorch's own error it may be there.

    Args:
        compute: type that it computes in.
        rounds: whether it rounds activations to int8, or cached values.
    """
    if rounds:
        return max(COMPUTE_BOUNDS[compute], ROUNDED_BOUND), ROUNDED_FACTOR
    return COMPUTE_BOUNDS[compute], FACTORS[compute]


@dataclass(frozen=True, eq=False)
class Expected:
    """What PyTorch answers to a probe.

    Attributes:
        probe: the tokens.
        logits: float64's, rounded to float32 [N, V].
        spread: their standard deviation.
        distance: how far PyTorch in float32 is off at each position, over the spread, [N].
        caches: what float64 adds to the two caches of each layer, [1, n, N, d] in float32.
        cache_distances: how far float32 is off in them at each position, over their standard deviation, [layers, N].
    """

    probe: Probe
    logits: npt.NDArray[np.float32]
    spread: float
    distance: npt.NDArray[np.float64]
    caches: Sequence[Sequence[npt.NDArray[np.float32]]] = ()
    cache_distances: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Difference:
    """How far logits are from reference logits.

    Attributes:
        max_abs_error: largest absolute difference.
        max_rel_error: that, over the standard deviation of the reference logits.
        top1_agreement: fraction of positions whose largest logit is the same token's.
        bound_fraction: largest error at a position over the bound there; more than 1 is too much.
        place: the position where that is, and what is wrong there if it is too much.
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    bound_fraction: float = 0.0
    place: str = ""


@dataclass(frozen=True)
class Quantisation:
    """What storing the weights in another type changes.

    The largest difference of millions of logits says little of it: a good int4 bundle has one of a standard deviation.
    The share of equal likeliest tokens and the divergence say how often, and how far, the model's choice moves.

    Attributes:
        max_abs_error: largest absolute difference of logits.
        max_rel_error: that, over the standard deviation of the logits of the checkpoint's own weights.
        top1_agreement: fraction of positions whose largest logit is the same token's.
        mean_kl_divergence: of the bundle's distribution of the next token from the checkpoint's, in nats, the mean over
            positions.
        tokens: what was asked for: a text, or random ids.
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    mean_kl_divergence: float
    tokens: str = ""


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        backends: each backend against the PyTorch model with the bundle's weights, in exact arithmetic.
        quantisation: the bundle's weights against the checkpoint's own.
        precision: what the weights are stored in.
        int8_activations: the backends that by default round activations to int8, as they run by default.
        compute: type that each backend computes in; float32 if it is not named.
        unavailable: backends that are here and could not be verified, each with its reason.
        absent: backends that are not here, each with what is missing.
        weights: how many of the bundle's tensors were compared with the checkpoint's, and how many are equal.
        problems: what is wrong with weights and constants, one sentence each.
    """

    backends: dict[str, Difference]
    quantisation: Quantisation
    precision: str
    int8_activations: dict[str, Difference] = field(default_factory=dict)
    compute: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def failures(self) -> list[str]:
        """One sentence for each bound that does not hold."""
        rounded = {f"{name} with int8 activations": d for name, d in self.int8_activations.items()}
        found = {**self.backends, **rounded}
        wrong = [f"{name}: {d.place}" for name, d in found.items() if not d.bound_fraction <= 1]
        return [*self.problems, *wrong]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return what ``gta-edge verify --json`` prints."""
        return {
            "backends": {name: asdict(d) for name, d in self.backends.items()},
            "int8_activations": {name: asdict(d) for name, d in self.int8_activations.items()},
            "quantisation": asdict(self.quantisation),
            "precision": self.precision,
            "compute": self.compute,
            "unavailable": self.unavailable,
            "absent": self.absent,
            "weights": self.weights,
            "failures": self.failures,
            "passed": self.passed,
        }


def difference(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> Difference:
    """Compare logits [..., V]. What is not finite, in either, is an infinite error."""
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return Difference(float("inf"), float("inf"), 0.0)
    largest = float(np.abs(logits - reference).max())
    spread = float(reference.std(dtype=np.float64))
    relative = largest / spread if spread > 0 else (0.0 if largest == 0 else float("inf"))
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).mean())
    return Difference(largest, relative, agreement)


def compare(
    answers: Sequence[npt.NDArray[np.float32]],
    expected: Sequence[Expected],
    floor: float = FLOAT32_BOUND,
    factor: float = FACTORS["fp32"],
    distances: Sequence[npt.NDArray[np.float64]] | None = None,
) -> Difference:
    """Compare a backend's answers to probes with PyTorch's, position by position.

    Args:
        answers: logits [n, V] for each probe, of its first n tokens.
        expected: PyTorch's.
        floor: the bound at a position where PyTorch is off by little, in standard deviations of the logits.
        factor: times what PyTorch is off by, where that is more.
        distances: what PyTorch is off by where it computes as the backend does; by default as in float32.
    """
    found = []
    for i, (logits, wanted) in enumerate(zip(answers, expected, strict=True)):
        distance = wanted.distance if distances is None else distances[i]
        found.append((len(logits), _compare(logits, wanted, np.maximum(floor, factor * distance))))
    worst = max((d for _, d in found), key=lambda d: d.bound_fraction)
    total = sum(count for count, _ in found)
    return replace(
        worst,
        max_abs_error=max(d.max_abs_error for _, d in found),
        max_rel_error=max(d.max_rel_error for _, d in found),
        top1_agreement=sum(count * d.top1_agreement for count, d in found) / total,
    )


def _compare(logits: npt.NDArray[np.float32], expected: Expected, bounds: npt.NDArray[np.float64]) -> Difference:
    reference, bounds = expected.logits[: len(logits)], bounds[: len(logits)]
    name = expected.probe.name
    finite = np.isfinite(logits).all(axis=-1) & np.isfinite(reference).all(axis=-1)
    if not finite.all():
        position = int(np.flatnonzero(~finite)[0])
        what = f"logits at position {position} of {name} are not finite"
        return Difference(float("inf"), float("inf"), 0.0, float("inf"), what)
    errors = np.abs(logits - reference).max(axis=-1)
    relative = np.divide(
        errors, expected.spread, out=np.where(errors > 0, np.inf, 0.0), where=expected.spread > 0, dtype=np.float64
    )
    fractions = relative / bounds
    position = int(fractions.argmax())
    fraction = float(fractions[position])
    place = f"position {position} of {name}"
    if not fraction <= 1:
        over = int((fractions > 1).sum())
        place = (
            f"max_rel_error {relative[position]:.3g} at {place} is above {bounds[position]:.2g}, which is allowed "
            f"there ({over} of {len(fractions)} positions are off by too much)"
        )
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).mean())
    return Difference(float(errors.max()), float(relative.max()), agreement, fraction, place)


def quantisation(logits: npt.NDArray[np.float32], own: npt.NDArray[np.float32], tokens: str = "") -> Quantisation:
    """Compare logits [..., V] of a bundle with those of its checkpoint's own weights; not finite is infinitely far."""
    found = difference(logits, own)
    divergence = _mean_kl_divergence(logits, own) if np.isfinite(found.max_abs_error) else float("inf")
    return Quantisation(found.max_abs_error, found.max_rel_error, found.top1_agreement, divergence, tokens)


def _mean_kl_divergence(logits: npt.NDArray[np.float32], own: npt.NDArray[np.float32]) -> float:
    """Return the mean over positions of KL(own || logits), in nats; position by position, which takes little memory."""
    vocabulary = logits.shape[-1]
    total, positions = 0.0, 0
    for changed, kept in zip(logits.reshape(-1, vocabulary), own.reshape(-1, vocabulary), strict=True):
        log_p, log_q = _log_softmax(kept), _log_softmax(changed)
        total += float(np.exp(log_p) @ (log_p - log_q))
        positions += 1
    return max(0.0, total / positions)  # rounding may leave it below 0


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
