"""What turns a checkpoint's matrix into codes while a bundle is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from gta_edge.numerics.quantization import BITS, QuantizedMatrix, quantize

__all__ = ["Quantizer"]


class Quantizer:
    """Quantises parameters by name, and remembers the last one: its codes and its scales are written one by one.

    Args:
        read: returns a parameter by its checkpoint name.
        precision: a key of ``gta_edge.numerics.quantization.BITS``.
        block_size: weights that share a scale; None for one scale per output channel.
        calibrated: parameters that are in codes already.
    """

    def __init__(
        self,
        read: Callable[[str], npt.NDArray[Any]],
        precision: str,
        block_size: int | None,
        calibrated: Mapping[str, QuantizedMatrix] | None = None,
    ) -> None:
        self.bits = BITS[precision]
        self.block_size = block_size
        self._read = read
        self._calibrated = calibrated or {}
        self._last: tuple[str, QuantizedMatrix] | None = None

    def __call__(self, name: str) -> QuantizedMatrix:
        """Return a matrix [out, in] in codes.

        Raises:
            OverflowError: it holds values that no float16 scale reaches.
        """
        if name in self._calibrated:
            return self._calibrated[name]
        if self._last is None or self._last[0] != name:
            try:
                self._last = name, quantize(self._read(name), self.bits, self.block_size)
            except OverflowError as error:
                raise OverflowError(f"{name} cannot be quantised: {error}; use fp32 or bf16") from error
        return self._last[1]
