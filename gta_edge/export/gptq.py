"""Rounding that makes up for its own error: GPTQ, and coordinate descent from what it finds.

What rounding changes in a layer's output for calibration inputs ``X`` is ``tr(E M E^T)``, with the error ``E`` of the
weights and ``M = X^T X``.

GPTQ (arXiv 2210.17323) rounds one input at a time. What rounding one changes is made up for, as well as may be, by the
inputs that are not rounded yet; how, says the inverse of ``M``. Inputs are taken in the order of their energy, the
strongest first, so that most others can make up for what matters most. Blocks of one scale stay whole in that order, so
that nothing of it is left at run time; a block's scale is chosen when its turn comes, for what corrections have made of
it, and for the error that each input leaves when all behind it have made up for it.

Coordinate descent (as in arXiv 2309.01885) then changes codes and scales one by one as long as the error falls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import QuantizedMatrix, best_scales, code_range, quantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["Moments", "corrected"]

_DAMPING = 0.01  # of the mean diagonal, as in the paper
_ROWS = 8192  # at once: a head has many
_COLUMNS = 128  # corrected one by one; those behind them get one matrix product. A multiple of every block size
_SWEEPS = {8: 0, 4: 3}  # of coordinate descent, by bits: int8 leaves it nothing to do


class Moments:
    """``X^T X`` of the inputs of one or several matrices, damped.

    Args:
        total: float32 [in, in].

    Raises:
        OverflowError: the moments are not finite.
    """

    def __init__(self, total: Tensor) -> None:
        damped = total.to(torch.float64, copy=True)
        diagonal = damped.diagonal()
        if not torch.isfinite(diagonal).all():
            raise OverflowError("the moments are not finite")
        diagonal += _DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)  # an input may never be used
        self._damped = damped
        self._eliminations: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def matrix(self) -> Tensor:
        """Float32 [in, in], damped."""
        return self._damped.float()

    def elimination(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the order of the inputs, in whole blocks of ``size``, and the factor of the inverse in that order.

        Returns:
            int64 [in], and the upper Cholesky factor of the inverse, float32 [in, in].
        """
        if size not in self._eliminations:
            blocks = self._damped.diagonal().view(-1, size)
            first = blocks.sum(1).argsort(dim=0, descending=True, stable=True)
            within = blocks.argsort(dim=1, descending=True, stable=True)
            order = (first[:, None] * size + within[first]).flatten()
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._damped[order][:, order]))
            self._eliminations[size] = order, torch.linalg.cholesky(inverse, upper=True).float()
        return self._eliminations[size]


def corrected(
    weight: Tensor, moments: Moments, bits: int, block_size: int | None, sweeps: int | None = None
) -> QuantizedMatrix:
    """Return a matrix in codes whose products with the calibration inputs are close to those of ``weight``.

    Args:
        weight: float32 [out, in]; left as it is.
        moments: of its inputs.
        bits: 8 or 4.
        block_size: weights along ``in`` that share a scale; None for one scale per output channel.
        sweeps: of coordinate descent after GPTQ; 3 for int4 and none for int8 by default.

    Raises:
        OverflowError: a scale is too large for float16, or the weight is not finite.
    """
    sweeps = _SWEEPS[bits] if sweeps is None else sweeps
    size = block_size or weight.shape[1]
    outputs = range(0, len(weight), _ROWS)  # rows do not depend on one another
    parts = [_rows(weight[start : start + _ROWS], moments, bits, size, sweeps) for start in outputs]
    codes, scales = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    if not (np.isfinite(scales).all() and torch.isfinite(weight).all()):
        raise OverflowError("it holds values that are not finite, or too large for a float16 scale")
    return QuantizedMatrix(codes.astype(np.int8), scales.astype(np.float16), bits, block_size or 0)


def _rows(weight: Tensor, moments: Moments, bits: int, size: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return codes [out, in] and scales [out, in / size], both in float32."""
    order, factor = moments.elimination(size)
    codes, scales = _eliminated(weight[:, order], factor, bits, size)
    back = order.argsort()
    codes = codes[:, back]
    scales = scales[:, order[::size].div(size, rounding_mode="floor").argsort()]
    matrix = moments.matrix
    plain = quantize(weight.numpy(), bits, size)
    worse = _loss(weight, codes, scales, matrix) > (_loss(weight, *_tensors(plain), matrix))
    if worse.any():  # greedy as it is, it may lose a row's bet
        codes[worse], scales[worse] = (each[worse] for each in _tensors(plain))
    for _ in range(sweeps):
        _descend(weight, codes, scales, matrix, bits, size)
    return codes, scales


def _tensors(quantized: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(quantized.codes).float(), torch.from_numpy(quantized.scales).float()


def _loss(weight: Tensor, codes: Tensor, scales: Tensor, matrix: Tensor) -> Tensor:
    """Return the error of each row's outputs [out]."""
    error = weight - codes * scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    return ((error @ matrix) * error).sum(1)


def _eliminated(weight: Tensor, factor: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Round ``weight`` [out, in], which is overwritten, one input after the other."""
    outputs, inputs = weight.shape
    codes, scales = torch.empty(outputs, inputs), torch.empty(outputs, inputs // size)
    lowest, highest = code_range(bits)
    left = factor.diagonal().reciprocal()  # what is left of an error of 1 when all others have made up for it
    for start in range(0, inputs, _COLUMNS):
        stop = min(start + _COLUMNS, inputs)
        errors = torch.empty(outputs, stop - start)
        for j in range(start, stop):
            if j % size == 0:
                block = weight[:, j : j + size].contiguous().numpy()
                importance = (left[j : j + size] / left[j : j + size].max()).square()[None].numpy()
                scales[:, j // size] = torch.from_numpy(best_scales(block, bits, importance).astype(np.float32))
            scale = scales[:, j // size]
            column = torch.clamp(torch.round(weight[:, j] / scale), lowest, highest)
            codes[:, j] = column
            error = (weight[:, j] - column * scale) / factor[j, j]
            weight[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, scales


def _descend(weight: Tensor, codes: Tensor, scales: Tensor, matrix: Tensor, bits: int, size: int) -> None:
    """Improve codes [out, in] and scales [out, in / size] of ``weight`` one by one, in place; no row's error rises.

    With the others held, the error is a parabola of a scale, and of a weight. Half its slope is ``pull``.
    """
    lowest, highest = code_range(bits)
    error = weight - codes * scales.repeat_interleave(size, dim=1)
    for start in range(0, weight.shape[1], size):
        part = slice(start, start + size)
        within, q, scale = matrix[part, part], codes[:, part], scales[:, start // size]
        pull = error @ matrix[:, part]
        along = q @ within
        step = (pull * q).sum(1) / (along * q).sum(1)  # not a number where all codes are 0
        best = (scale + step).half().float()  # the nearest float16 of the best is no worse than another
        best = torch.where((best > 0) & torch.isfinite(best), best, scale)
        pull -= (best - scale)[:, None] * along
        for j in range(size):
            column = q[:, j]
            moved = torch.clamp(torch.round(column + pull[:, j] / (best * within[j, j])), lowest, highest)
            pull -= ((moved - column) * best)[:, None] * within[j]
            q[:, j] = moved
        scales[:, start // size] = best
        error[:, part] = weight[:, part] - q * best[:, None]
