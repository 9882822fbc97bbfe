"""A bundle's stored weights against the checkpoint's: what storing may change follows from the type, and no more.

A tensor in a floating type holds the checkpoint's values, rounded once: every bit is known. Of a quantised matrix the
rounding is not known, since calibration moves it, but its size is: a weight is off by less than a step, so by the step
over the square root of 12 in the mean. Three things hold then. An output channel is off by a few times that, where
another channel, or the same one negated, is off by its own norm and more. The matrix as a whole is as large as the
checkpoint's: scales are chosen so that what is lost is orthogonal to what is kept. And what calibration adds to the
rounding is orthogonal to the weights, which makes a matrix longer by a known amount.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.graph.weights import StoredWeights
from gta_edge.numerics.dtypes import DTYPES, FLOAT_TYPES
from gta_edge.numerics.quantization import QuantizedMatrix

__all__ = ["WeightComparison", "compare_float", "compare_quantised"]

Floats = npt.NDArray[np.float32]

_ROUNDING = 3.0
"""Times a step over the square root of 12 that a channel may be off in any case: clipping reaches 1.3."""

_CALIBRATED = 10.0
"""The same where it is less than the channel's own norm: calibration on a short text reached 4.6."""

_GAIN = 0.004
"""Relative size of a matrix that is not explained: 0.0006 was found after rounding."""

_GAIN_OF_CALIBRATION = 3.0
"""Times what calibration is estimated to add, by which the estimate may be wrong: 1.4 was found. In the check of an
export a calibrated matrix must also be the one that calibration returned, which finds smaller faults of writing it."""

_SCALE_ERROR = 2.0**-25  # of a scale so small that float16's numbers lie evenly there

_ROUNDING_ERRORS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of rounding to a type."""

_DEVIATIONS = 6.0
_LOST = 2.0
"""Times its type's rounding error that a whole matrix may be off: more is lost where values are too small for it."""


@dataclass
class WeightComparison:
    """What is found of a bundle's weights, parameter by parameter.

    Args:
        bundle: its weights.
        checkpoint: what it was exported from.
        precision: that the bundle says it has; a floating type is then the narrowest that it may store.

    Attributes:
        compared: parameters that were compared.
        equal: those of them that hold the checkpoint's own values.
    """

    bundle: StoredWeights
    checkpoint: Checkpoint
    precision: str = ""
    compared: int = 0
    equal: int = 0
    _problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        ours, theirs = set(self.bundle.names), set(self.checkpoint.names)
        self._problems += [f"{name} is in the checkpoint and not in the bundle" for name in sorted(theirs - ours)]
        self._problems += [f"{name} is in the bundle and not in the checkpoint" for name in sorted(ours - theirs)]

    @property
    def problems(self) -> list[str]:
        """What is wrong so far: nothing, or the first that was found and how many tensors more differ."""
        if not self._problems:
            return []
        others = len(self._problems) - 1
        return [self._problems[0] + (f", and {others} more of the tensors" if others else "")]

    def read(self, name: str) -> tuple[Floats, Floats | None]:
        """Compare a parameter; return the bundle's values, and the checkpoint's where they are others.

        Raises:
            BundleError: the bundle's cannot be read.
            CheckpointError: the checkpoint's cannot be read.
        """
        if name not in self.checkpoint.names:
            return self.bundle.values(name), None
        own = self.checkpoint.read(name)
        self.compared += 1
        values: Floats | None = None
        for place in self.bundle.places(name):
            stored = self.bundle.read(name, place)
            if isinstance(stored, QuantizedMatrix):
                kind, found = f"int{stored.bits}", stored.values
                problem = compare_quantised(stored, own.astype(np.float32))
            else:
                kind, found = _name(self.bundle.dtype(place)), stored
                problem = compare_float(stored, own, self.bundle.dtype(place))
            if self.precision in FLOAT_TYPES and kind not in ("fp32", self.precision):
                problem = f"is stored in {kind}, and the bundle is in {self.precision}"
            if problem:
                self._problems.append(f"weights stored in {kind} are not the checkpoint's: {name} {problem}")
            if values is None:
                values = found
            del stored, found
        assert values is not None  # a parameter has a place
        wide = own.astype(np.float32, copy=False)
        if np.array_equal(values, wide):
            self.equal += 1
            return values, None
        return values, wide

    @property
    def counts(self) -> dict[str, int]:
        """How many parameters the bundle has, and how many of them are the checkpoint's own values."""
        return {"compared": self.compared, "equal": self.equal}


def compare_float(stored: Floats, own: npt.NDArray[Any], dtype: npt.DTypeLike) -> str | None:
    """Return what is wrong with a tensor that is stored in a floating type, None if nothing is.

    Args:
        stored: its values.
        own: the checkpoint's, in their own type.
        dtype: that it is stored in.
    """
    kind = np.dtype(dtype)
    name = _name(kind)
    with np.errstate(over="ignore"):
        expected = own.astype(kind).astype(np.float32)
    differs = stored != expected  # what is not a number differs from everything
    if differs.any():
        place = np.unravel_index(int(differs.argmax()), stored.shape)
        where = ", ".join(map(str, place))
        return (
            f"is {stored[place]:.7g} at [{where}], where the checkpoint's value makes "
            f"{expected[place]:.7g} ({int(differs.sum())} of {stored.size} values differ)"
        )
    wide = own.astype(np.float32, copy=False)
    lost, norm = _norm(wide - stored), _norm(wide)
    allowed = _LOST * _ROUNDING_ERRORS[name]
    if lost > allowed * norm:
        return f"loses {lost / norm:.2g} of its norm in {name}, {allowed:.2g} is explained by its rounding"
    return None


def compare_quantised(stored: QuantizedMatrix, own: Floats) -> str | None:
    """Return what is wrong with a quantised matrix, None if nothing is.

    Args:
        stored: the matrix.
        own: the checkpoint's values [out, in].
    """
    steps = stored.scales.astype(np.float32)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        return "has scales that are not positive numbers"
    values = stored.values
    error = own - values
    rounding = np.sqrt(np.mean(np.square(steps), axis=1) / 12)  # by output channel
    norms, errors = _row_norms(own), _row_norms(error)
    allowed = np.maximum(_ROUNDING * rounding, np.minimum(_CALIBRATED * rounding, norms))
    row = int(np.argmax(errors / allowed))
    if errors[row] > allowed[row]:
        over = int((errors > allowed).sum())
        return (
            f"is off by {errors[row] / max(norms[row], 1e-30):.2g} of its norm in output {row}, "
            f"{allowed[row] / max(norms[row], 1e-30):.2g} is explained by its rounding "
            f"({over} of {len(norms)} outputs are off by too much)"
        )
    return _gain_problem(own, values, error, rounding)


def _gain_problem(own: Floats, values: Floats, error: Floats, rounding: npt.NDArray[np.floating[Any]]) -> str | None:
    """Return what is wrong with a matrix's size as a whole; ``rounding`` is each output's expected error."""
    kept_rows = np.square(_row_norms(values)) * own.shape[1]
    kept = float(kept_rows.sum())
    if kept == 0:
        return None  # what is lost with it, the outputs have said
    gain = float(np.vdot(own, values)) / kept - 1
    expected = float(np.square(rounding).sum()) * own.shape[1] / kept
    calibration = max(0.0, float(np.vdot(error, error)) / kept - expected)
    unexplained = gain + calibration
    noise = float(np.sqrt(max(calibration, 0.01 * expected) / own.size))
    of_scales = float((kept_rows * _SCALE_ERROR / (rounding * np.sqrt(12))).sum()) / kept
    allowed = _GAIN + _GAIN_OF_CALIBRATION * calibration + _DEVIATIONS * noise + of_scales
    if abs(unexplained) <= allowed:
        return None
    return (
        f"is {1 / (1 + unexplained):.4g} times the checkpoint's as a whole, {1 - allowed:.4g} to {1 + allowed:.4g} is "
        "explained by its rounding"
    )


def _name(dtype: np.dtype[Any]) -> str:
    return next((each.name for each in DTYPES.values() if each.array == dtype.name), dtype.name)


def _row_norms(matrix: Floats) -> npt.NDArray[np.float64]:
    """Return the root mean square of each row."""
    found: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", matrix, matrix) / matrix.shape[1]).astype(np.float64)
    return found


def _norm(values: Floats) -> float:
    return float(np.sqrt(np.vdot(values, values)))
