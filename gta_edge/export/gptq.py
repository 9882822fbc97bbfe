"""GPTQ (arXiv 2210.17323): rounding that makes up for its own error.

Weights are rounded one input at a time. What rounding one changes in the layer's output is made up for, as well as
may be, by the inputs that are not rounded yet; how, says the inverse of ``X^T X`` over calibration inputs ``X``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gta_edge.libraries.optional import optional
from gta_edge.numerics.quantization import QuantizedMatrix, best_scales, code_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["corrected", "inverse_factor"]

_DAMPING = 0.01  # of the mean diagonal, as in the paper
_ROWS = 8192  # at once: a head has many
_COLUMNS = 128  # corrected one by one; those behind them get one matrix product. A multiple of every block size


def inverse_factor(moments: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse of ``moments`` = X^T X [in, in], float32.

    Raises:
        torch.linalg.LinAlgError: the moments are not finite.
    """
    moments = moments.double()
    diagonal = moments.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)  # an input may never be used
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def corrected(weight: Tensor, factor: Tensor, bits: int, block_size: int | None) -> QuantizedMatrix:
    """Return a matrix in codes whose products with the calibration inputs are close to those of ``weight``.

    Args:
        weight: float32 [out, in]; left as it is.
        factor: of its inputs, as ``inverse_factor`` returns it.
        bits: 8 or 4.
        block_size: weights along ``in`` that share a scale; None for one scale per output channel.

    Raises:
        OverflowError: a scale is too large for float16, or the weight is not finite.
    """
    outputs = range(0, len(weight), _ROWS)  # rows do not depend on one another
    parts = [_rows(weight[start : start + _ROWS].clone(), factor, bits, block_size) for start in outputs]
    codes, scales = (np.concatenate(each) for each in zip(*parts, strict=True))
    if not (np.isfinite(scales).all() and torch.isfinite(weight).all()):
        raise OverflowError("it holds values that are not finite, or too large for a float16 scale")
    return QuantizedMatrix(codes, scales, bits, block_size or 0)


def _rows(
    weight: Tensor, factor: Tensor, bits: int, block_size: int | None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Round ``weight`` [out, in], which is overwritten, and return codes and scales."""
    outputs, inputs = weight.shape
    size = block_size or inputs
    codes, scales = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs, inputs // size)
    lowest, highest = code_range(bits)
    for start in range(0, inputs, _COLUMNS):
        stop = min(start + _COLUMNS, inputs)
        errors = torch.empty(outputs, stop - start)
        for j in range(start, stop):
            if j % size == 0:  # a block begins: its scale is chosen for what corrections have made of it so far
                block = weight[:, j : j + size].contiguous().numpy()
                scales[:, j // size] = torch.from_numpy(best_scales(block, bits).astype(np.float32))
            scale = scales[:, j // size]
            column = torch.clamp(torch.round(weight[:, j] / scale), lowest, highest)
            codes[:, j] = column.to(torch.int8)
            error = (weight[:, j] - column * scale) / factor[j, j]
            weight[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes.numpy(), scales.numpy().astype(np.float16)
