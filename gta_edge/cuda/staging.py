"""Copies between the GPU's memory and arrays of the host that are not pinned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.session import Cuda

__all__ = ["Staging"]

_BYTES = 2**22
_ALIGNMENT = 16

Array = npt.NDArray[Any]


class Staging:
    """A few megabytes of pinned memory, taken at the first copy, which copies go through: many small ones at once.

    Args:
        cuda: where, and the stream that copies are ordered with.
        size_bytes: of the buffer.
    """

    def __init__(self, cuda: Cuda, size_bytes: int = _BYTES) -> None:
        self._cuda, self._size = cuda, size_bytes
        self._made: npt.NDArray[np.uint8] | None = None

    def read(self, parts: Iterable[tuple[int, Array]]) -> None:
        """Fill contiguous arrays, each from its address; done when this returns."""
        waiting: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []
        for address, there, place in self._pieces(parts):
            if place.start == 0 and waiting:
                self._finish(waiting)
            here = self._buffer[place]
            self._cuda.copy_out(here, address)
            waiting.append((there, here))
        self._finish(waiting)

    def write(self, parts: Iterable[tuple[int, Array]]) -> None:
        """Copy contiguous arrays, each to its address; done when this returns."""
        for address, there, place in self._pieces(parts):
            if place.start == 0:
                self._cuda.synchronize()  # what the buffer held is gone
            here = self._buffer[place]
            here[:] = there
            self._cuda.copy_in(address, here)
        self._cuda.synchronize()

    @property
    def _buffer(self) -> npt.NDArray[np.uint8]:
        if self._made is None:
            self._made = self._cuda.host_array((self._size,), np.uint8, "a buffer for rows of the cache")
        return self._made

    def _pieces(self, parts: Iterable[tuple[int, Array]]) -> Iterator[tuple[int, npt.NDArray[np.uint8], slice]]:
        """Yield an address, bytes of the host, and their place in the buffer; from its start again once it is full."""
        used = 0
        for address, array in parts:
            content = array.reshape(-1).view(np.uint8)
            done = 0
            while done < content.size:
                if used >= self._size:
                    used = 0
                count = min(content.size - done, self._size - used)
                yield address + done, content[done : done + count], slice(used, used + count)
                done += count
                used += -(-count // _ALIGNMENT) * _ALIGNMENT

    def _finish(self, waiting: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> None:
        self._cuda.synchronize()
        for there, here in waiting:
            there[:] = here
        waiting.clear()
