"""A GPU on the host: the package's own launch code, and under it the kernels in the simulation instead of a driver.

Tests that are marked ``gpu`` run on it, as far as they need no streams and graphs of torch:

    python -m pytest -p tests.helpers.simulated_gpu -m gpu tests/plugins/attention/test_kernels_gpu.py -k zeros

What lies at an address is known of the memory in ``gpu_calls.py`` alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.cuda.architecture import resident_blocks
from gta_edge.cuda.compiler import Compilable, Compiled
from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins.cache.launches import SIGNATURES as CACHE_SIGNATURES
from gta_edge.plugins.domain import KERNELS
from tests.helpers import gpu_calls
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.host_memory import memory
from tests.helpers.kernel_simulator import LaunchSpec, Pointer, Simulator, Value, Words

__all__ = ["SimulatedCuda", "install"]


class SimulatedCuda(FakeCuda):
    """A driver that runs the launches it is given."""

    def __init__(self, capability: tuple[int, int] = (8, 7)) -> None:
        super().__init__(capability)
        self.programs: list[Compilable] = []
        self.runs = 0

    def compile(self, program: Compilable, architecture: str, sources: Path) -> Compiled:
        self.programs.append(program)
        return Compiled(str(len(self.programs) - 1).encode(), {}, "")

    def code(self, cubin: bytes, name: str) -> SimpleNamespace:
        program = self.programs[int(cubin)]
        return SimpleNamespace(get_kernel=lambda kernel: self.kernel((program, kernel)))

    def kernel(self, name: Any) -> SimpleNamespace:
        occupancy = SimpleNamespace(max_active_blocks_per_multiprocessor=_resident)
        return SimpleNamespace(handle=super().kernel(name).handle, occupancy=occupancy)

    def copy(self, *arguments: int) -> tuple[int]:
        destination, source, size, _ = arguments
        ctypes.memmove(destination, source, size)
        return (0,)

    def launch(self, stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
        (grid, threads, shared_bytes), (program, name) = config, kernel.handle
        simulator = Simulator(KERNELS / program.source, program.kernels, program.defines(), [KERNELS])
        known: dict[int, np.ndarray] = {}
        values = [_value(argument, known) for argument in arguments]
        if name in CACHE_SIGNATURES:
            values[0] = _words(values[0], known)
        self.runs += 1
        simulator.run([LaunchSpec(name, grid, threads, shared_bytes, values)], self.runs)


def _resident(threads: int, shared_bytes: int) -> int:
    return min(resident_blocks(shared_bytes, "sm_87"), 1536 // threads)


def _value(argument: Any, known: dict[int, np.ndarray]) -> Value:
    """An argument as the simulation takes it; an address is an int of Python, in ``Launcher.launch`` as here."""
    if not isinstance(argument, int):
        return argument
    if not argument:
        return None
    for live in gpu_calls.LIVE:
        for tensor in live.tensors.values():
            start = tensor.data_ptr()
            if start <= argument < start + tensor.nbytes:
                array = known.setdefault(start, memory(start, (tensor.nbytes,), np.uint8))
                return Pointer(array, argument - start)
    raise LookupError(f"nothing that is known lies at address {argument:#x}")


def _words(table: Value, known: dict[int, np.ndarray]) -> Words:
    """A table of addresses, each of which is two words of five."""
    assert isinstance(table, Pointer)
    numbers = table.array.view(np.int64).reshape(-1, 5).tolist()
    return Words([_value(n, known) or 0 if i < 2 else n for row in numbers for i, n in enumerate(row)])


def install() -> SimulatedCuda:
    """Put the simulation in the place of this process's GPU, for good."""
    patch = pytest.MonkeyPatch()
    current_gpu.cache_clear()
    patch.setattr(gpu_calls, "DEVICE", "cpu")
    patch.setattr(torch.cuda, "is_available", lambda: True)
    return SimulatedCuda().install(patch)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest take this module as a plugin."""
    install()
