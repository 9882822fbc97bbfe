"""The GPU's memory of an engine's cache: full from the start, at addresses that stay.

Past input and present output of every tensor have one address, so no step copies them. What rows have received of
attention lies in one block for all layers. A plugin updates it where it lies; standard operators may read an input
after its output is written, so there the present has a block of its own, which is copied back behind every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import Gpu
from gta_edge.cuda.session import Cuda
from gta_edge.cuda.staging import Staging
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import is_open, is_scale, open_name, received_tensors
from gta_edge.numerics.cache_codes import BLOCK
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.runtime.block_cache import reopened
from gta_edge.runtime.cuda_cache import CudaCache, DeviceTensor
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.kernel_rows import KernelRows

__all__ = ["EngineMemory"]

_ALIGNMENT = 256
"""Bytes that TensorRT wants a tensor's address to be a multiple of."""
_FLOAT_BYTES = 4


class EngineMemory:
    """Memory for the caches of all layers of an engine's most rows.

    Args:
        cuda: where.
        config: the model's sizes.
        spec: the engine's.
        gpu: the GPU that the engine's plugins run on, which update what rows received where it lies, and whose kernels
            move rows; None of an engine without the attention's plugin.

    Attributes:
        rows: the same memory by rows, to be moved; None of an engine without a policy and trees.
        addresses: of each input and output of the engine by name.
        nbytes: of all of it.

    Raises:
        CapacityError: there is not as much.
    """

    def __init__(self, cuda: Cuda, config: ModelConfig, spec: EngineSpec, gpu: Gpu | None) -> None:
        self._cuda, self._spec = cuda, spec
        self.capacities = spec.capacities(config)
        self.addresses: dict[str, int] = {}
        self.nbytes = 0
        most = max(self.capacities)
        self._what = f"the cache of {most} tokens for {spec.max_batch} rows"
        self._staging = Staging(cuda)
        self._tensors: list[DeviceTensor] = []
        for tensor in spec.cache_tensors(config):
            capacity = self.capacities[tensor.layer]
            address = self._allocate(tensor.nbytes(spec.max_batch, capacity))
            self.addresses |= {tensor.past: address, tensor.present: address}
            self._tensors.append(DeviceTensor(tensor, address, capacity))
        placed = list(self._tensors)
        self._received_bytes = 0
        if spec.managed is not None and spec.managed.observe is not None:
            placed += self._add_received(in_place=gpu is not None)
        self._placed = placed
        self.rows: CudaCache | KernelRows | None = None
        moves = spec.managed is not None or spec.tree_rows > 0
        if moves and gpu is not None:
            self.rows = KernelRows(cuda, gpu, config, spec.compute, spec.max_batch, placed)
        elif moves:
            self.rows = CudaCache(cuda, config, placed)

    def _allocate(self, size_bytes: int) -> int:
        self.nbytes += size_bytes
        return self._cuda.allocate(size_bytes, self._what)

    def _add_received(self, *, in_place: bool) -> list[DeviceTensor]:
        """Make the block, or both, and an array for it on the host; return the layers' parts."""
        self._places: list[int] = []  # of each layer in the block, bytes
        size = 0
        for capacity in self.capacities:
            self._places.append(size)
            size += -(-_FLOAT_BYTES * self._spec.max_batch * capacity // _ALIGNMENT) * _ALIGNMENT
        self._received_bytes = size
        self._past = self._allocate(size)
        self._present = self._past if in_place else self._allocate(size)
        self._host: npt.NDArray[np.float32] = self._cuda.host_array(
            (size // _FLOAT_BYTES,), np.float32, "a buffer for what rows received"
        )
        placed = []
        for tensor, place, capacity in zip(
            received_tensors(len(self.capacities)), self._places, self.capacities, strict=True
        ):
            self.addresses |= {tensor.past: self._past + place, tensor.present: self._present + place}
            placed.append(DeviceTensor(tensor, self._past + place, capacity))
        return placed

    def addresses_from(self, row: int) -> dict[str, int] | None:
        """Return the addresses of the cache's inputs and outputs for a batch that begins with this row.

        None where one would not be where TensorRT can have it, or is not known by rows (what rows received).
        """
        if self._received_bytes:
            return dict(self.addresses) if not row else None
        found: dict[str, int] = {}
        for each in self._tensors:
            start = row * each.tensor.nbytes(1, each.capacity)
            if start % _ALIGNMENT:
                return None
            found |= {name: self.addresses[name] + start for name in (each.tensor.past, each.tensor.present)}
        return found

    # --- one sequence ----------------------------------------------------------------------------------------------

    def read(self, sequence: int, first: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        """Return what the cache holds of some tokens of a sequence, by ``CacheTensor.name``: [1, heads, rows, …].

        Of a cache in blocks ``first`` is the first token of one, and open blocks are whole.

        Args:
            sequence: row of the batch.
            first: the first of the tokens.
            tokens: how many.
        """
        found = {
            each.tensor.name: np.empty(each.tensor.shape(1, tokens), DTYPES[each.tensor.dtype].numpy)
            for each in self._tensors
        }
        self._staging.read(self._parts(sequence, first, found))
        return found

    def write(self, sequence: int, first: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put what ``read`` returned, or some of it, in its place."""
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._staging.write(self._parts(sequence, first, arrays))

    def zero_behind(self, counts: npt.NDArray[np.int64]) -> None:
        """Make zeros of rows that hold no token, where the attention may read them: of no cache in blocks.

        Args:
            counts: rows in use, int64 [L, B]; of sequences beyond those, none are.
        """
        for each in self._tensors:
            tensor, dtype = each.tensor, DTYPES[each.tensor.dtype].numpy
            for sequence in range(self._spec.max_batch if tensor.block == 1 else 0):
                first = int(counts[tensor.layer, sequence]) if sequence < counts.shape[1] else 0
                if first < each.capacity:
                    self.write(sequence, first, {tensor.name: np.zeros(tensor.shape(1, each.capacity - first), dtype)})

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Queue copies of all that a sequence has into others, what its rows received included."""
        for each in self._placed:
            for target in targets:
                places = each.row(target, 0, 0), each.row(source, 0, 0)
                self._cuda.copy_within(*places, each.tensor.nbytes(1, each.capacity))

    def _parts(
        self, sequence: int, first: int, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield the address of each head's rows, and the part of an array that belongs there."""
        for each in self._tensors:
            if each.tensor.name in arrays:
                row = first // each.tensor.block if each.tensor.block else 0
                for head, part in enumerate(arrays[each.tensor.name][0]):
                    yield each.row(sequence, head, row), part

    def reopen(self, sequence: int, block: int) -> None:
        """Put the values of a closed block of a sequence's cache back into its open block, as codes have them."""
        held = self.read(sequence, BLOCK * block, BLOCK)
        tensors = {each.tensor.name: each.tensor for each in self._tensors}
        codes = [name for name in held if not is_scale(name) and not is_open(name)]
        opened = {open_name(name): reopened(tensors, held, name, 0) for name in codes}
        self.write(sequence, 0, opened)

    # --- what rows received ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Queue what has to follow a step on the stream: what is present is past from then on."""
        if self._received_bytes and self._present != self._past:
            self._cuda.copy_within(self._past, self._present, self._received_bytes)

    def received(self, batch: int) -> list[npt.NDArray[np.float32]]:
        """Return what each layer's rows received, float32 [B, S] per layer: views of memory that the next call fills.

        Args:
            batch: B of the steps so far.
        """
        self._cuda.copy_out(self._host, self._past)
        self._cuda.synchronize()
        found: list[npt.NDArray[np.float32]] = []
        for place, capacity in zip(self._places, self.capacities, strict=True):
            start = place // _FLOAT_BYTES
            found.append(self._host[start : start + batch * capacity].reshape(batch, capacity))
        return found
