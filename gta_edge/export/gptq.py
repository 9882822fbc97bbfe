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
        self._damped = damped / diagonal.mean()  # only their proportions matter; float32 has room around 1
        self._eliminations: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def matrix(self) -> Tensor:
        """Float32 [in, in], damped, with a mean of 1 on the diagonal."""
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
    inputs = weight.T.contiguous()  # [in, out]: one input after the other is worked on, so each lies in one piece
    codes, scales = _eliminated(inputs[order], factor, bits, size)
    codes = codes[order.argsort()]
    scales = scales[order[::size].div(size, rounding_mode="floor").argsort()]
    matrix = moments.matrix
    plain = _tensors(quantize(weight.numpy(), bits, size))
    worse = _loss(inputs, codes, scales, matrix) > _loss(inputs, *plain, matrix)
    if worse.any():  # greedy as it is, it may lose a row's bet
        codes[:, worse], scales[:, worse] = (each[:, worse] for each in plain)
    error = inputs - codes * scales.repeat_interleave(size, dim=0)
    for _ in range(sweeps):
        _descend(inputs, error, codes, scales, matrix, bits, size)
    return codes.T, scales.T


def _tensors(quantized: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """Return codes [in, out] and scales [in / size, out] in float32."""
    return torch.from_numpy(quantized.codes.T).float(), torch.from_numpy(quantized.scales.T).float()


def _loss(weight: Tensor, codes: Tensor, scales: Tensor, matrix: Tensor) -> Tensor:
    """Return the error of each row's outputs [out]; ``weight`` and ``codes`` are [in, out]."""
    error = weight - codes * scales.repeat_interleave(len(weight) // len(scales), dim=0)
    return ((matrix @ error) * error).sum(0)


def _eliminated(weight: Tensor, factor: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Round ``weight`` [in, out], which is overwritten, one input after the other."""
    inputs, outputs = weight.shape
    codes, scales = torch.empty(inputs, outputs), torch.empty(inputs // size, outputs)
    lowest, highest = code_range(bits)
    left = factor.diagonal().reciprocal()  # what is left of an error of 1 when all others have made up for it
    for start in range(0, inputs, _COLUMNS):
        stop = min(start + _COLUMNS, inputs)
        errors = torch.empty(stop - start, outputs)
        for j in range(start, stop):
            if j % size == 0:
                block = weight[j : j + size].T.contiguous().numpy()
                importance = (left[j : j + size] / left[j : j + size].max()).square()[None].numpy()
                scales[j // size] = torch.from_numpy(best_scales(block, bits, importance).astype(np.float32))
            scale = scales[j // size]
            torch.clamp(torch.round(weight[j] / scale), lowest, highest, out=codes[j])
            error = torch.addcmul(weight[j], codes[j], scale, value=-1).mul_(left[j])
            weight[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        weight[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes, scales


def _descend(
    weight: Tensor, error: Tensor, codes: Tensor, scales: Tensor, matrix: Tensor, bits: int, size: int
) -> None:
    """Improve codes [in, out] and scales [in / size, out] of ``weight`` one by one, in place; no row's error rises.

    With the others held, the error is a parabola of a scale, and of a weight. Half its slope is ``pull``. ``error``
    [in, out] is what the codes leave of the weights, before and afterwards.
    """
    lowest, highest = code_range(bits)
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        within, q, scale = matrix[part, part], codes[part], scales[start // size]
        pull = matrix[part] @ error
        along = within @ q
        step = (pull * q).sum(0) / (along * q).sum(0)  # not a number where all codes are 0
        best = (scale + step).half().float()  # the nearest float16 of the best is no worse than another
        best = torch.where((best > 0) & torch.isfinite(best), best, scale)
        pull.addcmul_(along, best - scale, value=-1)
        rates = torch.outer(within.diagonal().reciprocal(), best.reciprocal())
        for j in range(size):
            moved = torch.addcmul(q[j], pull[j], rates[j]).round_().clamp_(lowest, highest)
            pull.addr_(within[j], (moved - q[j]).mul_(best), alpha=-1)
            q[j] = moved
        scales[start // size] = best
        error[part] = weight[part] - q * best
