"""As much of CUDA's driver as a session needs: memory, copies, one stream, and graphs captured from it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, CapacityError
from gta_edge.libraries.cuda import cuda_extra
from gta_edge.libraries.optional import optional
from gta_edge.support.memory import available_bytes

__all__ = ["Cuda", "check_usable", "free_gpu_bytes"]

_BLOCK_TRIES = 8
"""Halvings of the interval in which the largest block is looked for: to half a percent of what was asked for."""


class Cuda:
    """One GPU's primary context with a stream of its own; everything allocated here goes with ``close``.

    Args:
        device_id: CUDA's number for the GPU.

    Raises:
        BackendError: the driver refuses; what it said.
    """

    def __init__(self, device_id: int = 0) -> None:
        self._driver = optional("cuda.bindings.driver", cuda_extra())
        self._addresses: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", device_id)
        self._before = self._call("cuCtxGetCurrent")
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        try:
            self.make_current()
            self._stream = self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        except BaseException:
            self._call("cuDevicePrimaryCtxRelease", self._device)
            raise

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def make_current(self) -> None:
        """Let this thread's calls, TensorRT's too, be for this GPU."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def shares_memory(self) -> bool:
        """Whether the GPU's memory is the CPU's, as on a Jetson."""
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        return bool(int(self._call("cuDeviceGetAttribute", attribute, self._device)))

    @property
    def cache_bytes(self) -> int:
        """Size of the GPU's second-level cache."""
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
        return int(self._call("cuDeviceGetAttribute", attribute, self._device))

    def free_bytes(self) -> int:
        """Return the GPU's free memory; where it is the CPU's, what the system would drop of file caches counts too."""
        free, _ = self._call("cuMemGetInfo")
        return max(int(free), (available_bytes() or 0) if self.shares_memory else 0)

    def allocate(self, size_bytes: int, what: str) -> int:
        """Return the address of new, zeroed memory of the GPU.

        Raises:
            CapacityError: there is not as much; ``what`` it was for, how much, and what is free.
        """
        status, address = self._driver.cuMemAlloc(size_bytes)
        if int(status):
            if status != self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise BackendError(f"the GPU gave no memory for {what} ({_name(status)})", "run `gta-edge doctor`")
            problem, remedy = self._room(size_bytes)
            raise CapacityError(f"{what} takes {_gb(size_bytes)} and {problem}", remedy)
        self._addresses.append(int(address))
        self._call("cuMemsetD8Async", address, 0, size_bytes, self._stream)
        return int(address)

    def _room(self, size_bytes: int) -> tuple[str, str]:
        """Return why so many bytes could not be had, and what helps."""
        free, remedy = self.free_bytes(), "build with a smaller --max-length or --max-batch"
        if size_bytes > free:
            return f"the GPU has {_gb(free)} free", f"close other programs, or {remedy}"
        largest = self._largest_block(size_bytes)
        if not self.shares_memory:
            return (
                f"the largest block that the GPU gives is {_gb(largest)}, of {_gb(free)} free in pieces",
                f"close other programs, or {remedy}",
            )
        return (
            f"the largest block that CUDA gives is {_gb(largest)}: it shares the system's memory, of which {_gb(free)} "
            "are free only once file caches are dropped",
            f"run: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches, close other programs, or {remedy}",
        )

    def _largest_block(self, limit: int) -> int:
        """Return about the most bytes below ``limit`` that can be had at once now."""
        low, high = 0, limit
        for _ in range(_BLOCK_TRIES):
            middle = (low + high) // 2
            status, address = self._driver.cuMemAlloc(middle) if middle else (1, None)
            if int(status):
                high = middle
            else:
                self._call("cuMemFree", address)
                low = middle
        return low

    def host_array(self, shape: Sequence[int], dtype: npt.DTypeLike, what: str = "a buffer") -> npt.NDArray[Any]:
        """Return an array in pinned memory, which copies reach without a detour.

        Raises:
            CapacityError: there is not as much; ``what`` it was for, how much, and what is free.
        """
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        status, found = self._driver.cuMemAllocHost(size)
        if int(status):
            if status != self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise BackendError(f"CUDA's cuMemAllocHost failed ({_name(status)})", "run `gta-edge doctor`")
            free = available_bytes()
            raise CapacityError(
                f"{what} takes {_gb(size)} of pinned memory, which CUDA does not give"
                f"{'' if free is None else f' ({_gb(free)} of the system are free)'}",
                "close other programs, raise the limit of the container, or build with a smaller --max-batch",
            )
        address = int(found)
        self._pinned.append(address)
        buffer: Any = (ctypes.c_byte * size).from_address(address)
        array: npt.NDArray[Any] = np.frombuffer(buffer, dtype)
        return array.reshape(shape)

    def copy_in(self, address: int, array: npt.NDArray[Any]) -> None:
        """Start the copy of a contiguous pinned array to the GPU."""
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)

    def copy_out(self, array: npt.NDArray[Any], address: int) -> None:
        """Start the copy of the GPU's memory to a contiguous pinned array."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def copy_within(self, destination: int, source: int, size_bytes: int) -> None:
        """Start a copy within the GPU's memory."""
        self._call("cuMemcpyDtoDAsync", destination, source, size_bytes, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._stream)

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Record what is queued in the body instead of running it; the list then holds the graph, for ``replay``."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        made: list[Any] = []
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            yield made
        except BaseException:
            with suppress(BackendError):
                self._call("cuStreamEndCapture", self._stream)
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            made.append(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)
        self._graphs.append(made[0])

    def forget(self, graph: Any) -> None:
        """Free what was captured; None is nothing."""
        if graph is not None:
            self._graphs.remove(graph)
            self._call("cuGraphExecDestroy", graph)

    def replay(self, graph: Any) -> None:
        """Start what was captured."""
        self._call("cuGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """Give everything back; may be called again."""
        if self._context is None:
            return
        with suppress(BackendError):  # a context that failed cannot be tidied up
            self.make_current()
            self.synchronize()
            for graph in self._graphs:
                self._call("cuGraphExecDestroy", graph)
            for address in self._addresses:
                self._call("cuMemFree", address)
            for address in self._pinned:
                self._call("cuMemFreeHost", address)
            self._call("cuStreamDestroy", self._stream)
            self._call("cuDevicePrimaryCtxRelease", self._device)
            self._call("cuCtxSetCurrent", self._before)  # a context that is gone should be current for nobody
        self._graphs, self._addresses, self._pinned, self._context = [], [], [], None

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, function)(*arguments)
        if int(status):
            raise BackendError(f"CUDA's {function} failed ({_name(status)})", "run `gta-edge doctor`")
        return values[0] if len(values) == 1 else tuple(values)


def check_usable() -> None:
    """Take the GPU as a session does, which fails where its memory is full or it is another program's alone.

    Raises:
        BackendError: the driver refuses; what it said.
    """
    Cuda().close()


def free_gpu_bytes() -> int | None:
    """Return the free memory of a GPU that has its own, None where there is none or it shares the CPU's."""
    try:
        cuda = Cuda()
    except BackendError:
        return None
    try:
        return None if cuda.shares_memory else cuda.free_bytes()
    finally:
        cuda.close()


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))
