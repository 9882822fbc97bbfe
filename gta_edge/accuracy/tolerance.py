"""How close logits are to the reference, and how close they must be.

The reference is the PyTorch model with the bundle's own weights, so that a wrong graph shows in every precision; what
storing the weights in another type changes is reported beside it. Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.model.config import ModelConfig

__all__ = [
    "COMPUTE_BOUNDS",
    "FLOAT32_BOUND",
    "ROUNDED_BOUND",
    "STORAGE_BOUNDS",
    "Difference",
    "Quantisation",
    "Report",
    "difference",
    "probe",
    "quantisation",
]

COMPUTE_BOUNDS: dict[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}
"""Largest ``max_rel_error`` of a backend that computes in this type."""

FLOAT32_BOUND = COMPUTE_BOUNDS["fp32"]

STORAGE_BOUNDS: dict[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}
"""Largest ``max_rel_error`` that storing the weights in this type may cause; more means a damaged weight.

What int8 and int4 change is no damage: perplexity judges it (``gta-edge eval``).
"""

ROUNDED_BOUND = 2.0
"""The same of a backend that rounds activations to int8 for matmuls with int8 and int4 weights.

Each matmul is off by half a percent then, and through the layers the largest of millions of logits is off by a tenth
of their spread (the trained example model) to half of it (54 layers of random weights). Logits of a kernel that is
wrong have nothing to do with the reference, and the largest difference is five or more times the spread.
"""

_PREFILL_TOKENS = 256
_DECODE_TOKENS = 16


@dataclass(frozen=True)
class Difference:
    """How far logits are from reference logits.

    Attributes:
        max_abs_error: largest absolute difference.
        max_rel_error: that, over the standard deviation of the reference logits.
        top1_agreement: fraction of positions whose largest logit is the same token's.
    """

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float


@dataclass(frozen=True)
class Quantisation(Difference):
    """What storing the weights in another type changes.

    The largest difference of millions of logits says little of it: a good int4 bundle has one of a standard deviation.
    The share of equal likeliest tokens and the divergence say how often, and how far, the model's choice moves.

    Attributes:
        mean_kl_divergence: of the bundle's distribution of the next token from the checkpoint's, in nats, the mean over
            positions.
    """

    mean_kl_divergence: float


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
    """

    backends: dict[str, Difference]
    quantisation: Quantisation
    precision: str
    int8_activations: dict[str, Difference] = field(default_factory=dict)
    compute: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """One sentence for each bound that does not hold."""
        bounds = {name: COMPUTE_BOUNDS[self.compute.get(name, "fp32")] for name in self.backends}
        found = [
            f"{name}: max_rel_error {d.max_rel_error:.3g} is above {bounds[name]:g}"
            for name, d in self.backends.items()
            if not d.max_rel_error <= bounds[name]
        ]
        found += [
            f"{name} with int8 activations: max_rel_error {d.max_rel_error:.3g} is above {ROUNDED_BOUND:g}"
            for name, d in self.int8_activations.items()
            if not d.max_rel_error <= ROUNDED_BOUND
        ]
        bound = STORAGE_BOUNDS.get(self.precision, float("inf"))
        if not self.quantisation.max_rel_error <= bound:  # not a number is above every bound
            found.append(
                f"weights stored in {self.precision} change the logits by {self.quantisation.max_rel_error:.3g} "
                f"of their standard deviation, above {bound:g}"
            )
        return found

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


def quantisation(logits: npt.NDArray[np.float32], own: npt.NDArray[np.float32]) -> Quantisation:
    """Compare logits [..., V] of a bundle with those of its checkpoint's own weights; not finite is infinitely far."""
    found = difference(logits, own)
    divergence = _mean_kl_divergence(logits, own) if np.isfinite(found.max_abs_error) else float("inf")
    return Quantisation(**vars(found), mean_kl_divergence=divergence)


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


def probe(config: ModelConfig) -> tuple[npt.NDArray[np.int64], int]:
    """Return the tokens to verify with, [1, N], and how many of them are the prompt; the rest go one by one."""
    limit = config.max_position_embeddings
    decode = min(_DECODE_TOKENS, limit // 4)
    prefill = min(_PREFILL_TOKENS, limit - decode)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, prefill + decode))
    return ids.astype(np.int64), prefill
