"""What turns a checkpoint's matrix into codes while a bundle is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from gta_edge.formats.weights import Storage
from gta_edge.numerics.quantization import BITS, QuantizedMatrix, quantize

__all__ = ["Quantizer"]


class Quantizer:
    """Quantises parameters by name, and remembers the last one: its codes and its scales are written one by one.

    Args:
        read: returns a parameter by its checkpoint name.
        storage: how each matrix is stored.
        ready: parameters that are in codes already, as ``storage`` says.
    """

    def __init__(
        self,
        read: Callable[[str], npt.NDArray[Any]],
        storage: Storage,
        ready: Mapping[str, QuantizedMatrix] | None = None,
    ) -> None:
        self._read = read
        self._storage = storage
        self._ready = ready or {}
        self._last: tuple[str, QuantizedMatrix] | None = None

    def format_of(self, name: str) -> tuple[int, int | None]:
        """Return the bits of a matrix's codes, and its block size; None for one scale per output channel."""
        precision, block_size = self._storage.of(name)
        return BITS[precision], block_size

    def __call__(self, name: str) -> QuantizedMatrix:
        """Return a matrix [out, in] in codes.

        Raises:
            OverflowError: it holds values that no float16 scale reaches.
        """
        if name in self._ready:
            return self._ready[name]
        if self._last is None or self._last[0] != name:
            try:
                self._last = name, quantize(self._read(name), *self.format_of(name))
            except OverflowError as error:
                raise OverflowError(f"{name} cannot be quantised: {error}; use fp32 or bf16") from error
        return self._last[1]
