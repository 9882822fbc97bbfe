"""Weights in their file, read when they are asked for.

They are read, not mapped: a file that is cut short meanwhile is an error then, and not the end of the process. And they
are read by us, since onnx-ir takes no file that has several hard links, as copies by links, package stores and
container layers have, or that is a link itself, as in the Hugging Face cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BundleError
from gta_edge.libraries.optional import optional
from gta_edge.support.text import brief, printable

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["StoredTensor"]

_BLOCK_BYTES = 2**24


class StoredTensor(ir.ExternalTensor):
    """A tensor whose data lies in a file; each access reads it anew, into memory of its own.

    Args:
        file: the file itself, links followed.
        declared: what the graph says of it.
    """

    __slots__ = ("_file",)

    def __init__(self, file: Path, declared: ir.ExternalTensor) -> None:
        place = declared.location, declared.offset or 0, declared.nbytes
        shape = ir.Shape(declared.shape.numpy())
        super().__init__(*place, declared.dtype, shape=shape, name=str(declared.name))
        self._file = file

    def numpy(self) -> npt.NDArray[Any]:
        """Return the values.

        Raises:
            BundleError: the file cannot be read, or ends too early.
        """
        data = np.empty(self.nbytes, np.uint8)
        self._read(0, data.data)
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(data, self.dtype, shape=self.shape).numpy()
        return data.view(self.dtype.numpy().newbyteorder("<")).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.numpy(), dtype)

    def tobytes(self) -> bytes:
        """Return the data as it lies in the file; otherwise as ``numpy``."""
        data = bytearray(self.nbytes)
        self._read(0, memoryview(data))
        return bytes(data)

    def tofile(self, file: Any) -> None:
        """Copy the data to an open file, block by block; otherwise as ``numpy``."""
        block = memoryview(bytearray(min(_BLOCK_BYTES, self.nbytes)))
        for start in range(0, self.nbytes, _BLOCK_BYTES):
            part = block[: min(_BLOCK_BYTES, self.nbytes - start)]
            self._read(start, part)
            file.write(part)

    def release(self) -> None:
        """Do nothing: no data is held."""

    def _read(self, start: int, target: memoryview) -> None:
        """Fill ``target`` with the data from byte ``start`` of the tensor on."""
        try:
            with self._file.open("rb", buffering=0) as file:
                file.seek((self.offset or 0) + start)
                done = 0
                while done < len(target) and (count := file.readinto(target[done:])):
                    done += count
        except OSError as error:
            raise BundleError(
                f"{printable(str(self._file))}: cannot be read ({error.strerror})", "copy the bundle anew"
            ) from error
        if done < len(target):
            raise BundleError(
                f"{printable(str(self._file))}: ends within {brief(self.name)}, it was cut short",
                "copy the bundle anew",
            )
