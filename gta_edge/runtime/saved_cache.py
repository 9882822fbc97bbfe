"""The cache of one sequence outside of a session: what its tokens need not be run again for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.model.kv_cache import CacheTensor
from gta_edge.numerics.dtypes import DTYPES

__all__ = ["SavedCache", "place_in"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SavedCache:
    """The cache of one sequence in the host's memory, as ``Session.export_cache`` returns it.

    A session of the same bundle, backend and types takes it back bit for bit.

    Attributes:
        length: tokens that it is of.
        dtype: how cached values are stored, one of ``CACHES``.
        tensors: by ``CacheTensor.name``, each of the extents ``CacheTensor.shape(1, length)``.
    """

    length: int
    dtype: str
    tensors: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    def checked(self, tensors: Sequence[CacheTensor], dtype: str, tokens: int) -> dict[str, Array]:
        """Return the arrays of the first ``tokens``, once it is sure that they are those of a session's cache.

        Raises:
            InputError: they are of another type, or of another model.
        """
        if self.dtype != dtype:
            raise InputError(
                f"the saved cache holds {self.dtype} and the session's {dtype}", f"load with cache_dtype={self.dtype!r}"
            )
        if not 0 < tokens <= self.length:
            raise InputError(
                f"{tokens} tokens of a saved cache were asked for", f"expected 1 to the {self.length} that it holds"
            )
        if {tensor.name for tensor in tensors} != set(self.tensors):
            raise InputError("the saved cache has other tensors than the session's", "take that of the same model")
        for tensor in tensors:
            array, shape = self.tensors[tensor.name], tensor.shape(1, self.length)
            if array.shape != shape or array.dtype != DTYPES[tensor.dtype].numpy:
                raise InputError(
                    f"{tensor.name} of the saved cache is {array.dtype} of shape {list(array.shape)}; expected "
                    f"{DTYPES[tensor.dtype].numpy} of shape {list(shape)}",
                    "take that of the same model and backend",
                )
        return {tensor.name: self.tensors[tensor.name][place_in(tensor, 0, tokens)] for tensor in tensors}


def place_in(tensor: CacheTensor, row: int, tokens: int) -> tuple[slice, ...]:
    """Return where the first tokens of a row of the batch are in a tensor of any capacity."""
    return slice(row, row + 1), *(slice(0, extent) for extent in tensor.shape(1, tokens)[1:])
