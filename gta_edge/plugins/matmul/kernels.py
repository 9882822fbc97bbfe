"""The matmul kernels on a GPU: compiled and loaded once, then launched on device addresses.

Knows of no framework. Whoever holds the memory (a session, an engine's plugin) gives addresses and a stream. A launch
allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gta_edge.cuda.gpu import Gpu, Launcher, check_addresses
from gta_edge.errors import BackendError
from gta_edge.plugins.domain import KERNELS
from gta_edge.plugins.matmul.definition import MAX_OUTPUTS
from gta_edge.plugins.matmul.launches import SIGNATURE, KernelLaunch, plan_matmul, programs_for
from gta_edge.plugins.matmul.tiling import Variant

__all__ = ["MatMulKernels", "matmul_kernels"]

_ALIGNMENTS = {"bias": 2}
_OPTIONAL = ("bias",)
_LAUNCHES_CACHED = 1024
"""A model has a handful of shapes, for each number of rows."""


@cache
def matmul_kernels(variant: Variant, gpu: Gpu) -> MatMulKernels:
    """Return the kernels of a variant on a GPU, compiled and loaded at the first call.

    Raises:
        BackendError: as for ``MatMulKernels``.
    """
    return MatMulKernels(variant, gpu)


class MatMulKernels:
    """All kernels of one variant, loaded on one GPU.

    Args:
        variant: types of the weights and of x.
        gpu: where they run.

    Raises:
        BackendError: the kernels cannot be compiled or not be loaded.
    """

    def __init__(self, variant: Variant, gpu: Gpu) -> None:
        self.variant, self.gpu = variant, gpu
        self.programs = programs_for(variant, gpu.architecture)
        self._launcher = Launcher(gpu, "quantised matmul", KERNELS)
        self._kernels = self._launcher.load(
            {program: dict.fromkeys(program.kernels, program.shared_bytes) for program in self.programs.all}
        )
        self._planned = lru_cache(_LAUNCHES_CACHED)(self._plan)
        self._prepared = lru_cache(_LAUNCHES_CACHED)(self._prepare)

    def plan(self, rows: int, in_features: int, output_sizes: Sequence[int]) -> KernelLaunch:
        """Return what a call with these sizes launches.

        Raises:
            BackendError: a size that the kernels cannot take.
        """
        return self._planned(rows, in_features, tuple(output_sizes))

    def launch(
        self,
        stream: Any,
        *,
        x: int,
        weight: int,
        scale: int,
        bias: int = 0,
        outputs: Sequence[int],
        rows: int,
        in_features: int,
        output_sizes: Sequence[int],
    ) -> None:
        """Launch one call of the op: y = x · dequantise(W) + bias, in float32 sums.

        Addresses are multiples of 16 bytes, that of the bias of 2. What they name must live until the stream has passed
        the launch.

        Args:
            stream: of the GPU: a ``cuda.core.Stream``, anything with ``__cuda_stream__``, or a handle. The GPU's
                context is current in the calling thread: handle 0 means the default stream of what is current.
            x: [rows, in_features] of the variant's compute type.
            weight: packed, see ``packing.py``; of as many outputs as ``output_sizes`` add up to.
            scale: float16, packed.
            bias: [sum of output_sizes] of the compute type; 0 for none.
            outputs: of each matrix, [rows, output_sizes[i]] of the compute type.
            rows: of x.
            in_features: K, a multiple of 8.
            output_sizes: N of each matrix; all but the last are multiples of 16.

        Raises:
            BackendError: a size or an address that the kernels cannot take, or the launch failed.
        """
        config, kernel, numbers = self._prepared(rows, in_features, tuple(output_sizes))
        if len(outputs) != len(output_sizes):
            raise BackendError(f"there are {len(outputs)} outputs", f"expected {len(output_sizes)}, one for each size")
        names = SIGNATURE.addresses[: 4 + len(outputs)]
        addresses = (x, weight, scale, bias, *outputs)
        check_addresses(zip(names, addresses, strict=True), _ALIGNMENTS, _OPTIONAL)
        absent = (0,) * (MAX_OUTPUTS - len(outputs))
        self._launcher.launch(stream, [(config, kernel, *addresses, *absent, *numbers)])

    def _plan(self, rows: int, in_features: int, output_sizes: tuple[int, ...]) -> KernelLaunch:
        return plan_matmul(self.programs, self.gpu.processors, rows, in_features, output_sizes)

    def _prepare(self, rows: int, in_features: int, output_sizes: tuple[int, ...]) -> tuple[Any, Any, tuple[Any, ...]]:
        """Return all of a launch that does not depend on addresses, as cuda.core takes it."""
        plan = self.plan(rows, in_features, output_sizes)
        sizes = output_sizes + (0,) * (MAX_OUTPUTS - len(output_sizes))
        # An int of Python would be passed as 8 bytes.
        numbers = tuple(np.int32(number) for number in (rows, in_features, *sizes))
        return self._launcher.config(plan.launch), self._kernels[plan.program, plan.kernel], numbers
