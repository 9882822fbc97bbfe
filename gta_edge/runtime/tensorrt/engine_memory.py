"""The GPU's memory of an engine's cache: full from the start, at addresses that stay.

Past input and present output of every tensor have one address, so no step copies them. What rows have received of
attention lies in one block for all layers. A plugin updates it where it lies; standard operators may read an input
after its output is written, so there the present has a block of its own, which is copied back behind every step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.gpu import Gpu
from gta_edge.cuda.session import Cuda
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import received_tensors
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
        rows: the same memory by rows, to be moved; None of an engine without a policy.
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
        placed = []
        for tensor in spec.cache_tensors(config):
            capacity = self.capacities[tensor.layer]
            address = self._allocate(tensor.nbytes(spec.max_batch, capacity))
            self.addresses |= {tensor.past: address, tensor.present: address}
            placed.append(DeviceTensor(tensor, address, capacity))
        self._received_bytes = 0
        if spec.managed is not None and spec.managed.observe is not None:
            placed += self._add_received(in_place=gpu is not None)
        self.rows: CudaCache | KernelRows | None = None
        if spec.managed is not None and gpu is not None:
            self.rows = KernelRows(cuda, gpu, config, spec.compute, spec.max_batch, placed)
        elif spec.managed is not None:
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
