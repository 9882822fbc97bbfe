"""The kernels that move, fold and rotate rows, their sources run on the host, on the memory of a simulated driver."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gta_edge.plugins.cache.launches import FOLD, MOVE, ROTATE, SIGNATURES, Program, row_launch
from gta_edge.plugins.domain import KERNELS
from tests.helpers.kernel_simulator import LaunchSpec, Pointer, Simulator, Words
from tests.helpers.tensorrt_simulator import Driver

__all__ = ["SimulatedCacheKernels"]


class SimulatedCacheKernels:
    """In the place of ``CacheKernels``: what is launched runs when the driver's stream is waited for."""

    def __init__(self, driver: Driver, program: Program) -> None:
        self._driver = driver
        self._simulator = Simulator(KERNELS / program.source, program.kernels, program.defines(), [KERNELS])

    def move(self, stream: int, **arguments: int) -> None:
        self._launch(MOVE, arguments)

    def fold(self, stream: int, **arguments: int) -> None:
        self._launch(FOLD, arguments)

    def rotate(self, stream: int, **arguments: int) -> None:
        self._launch(ROTATE, arguments)

    def _launch(self, kernel: str, arguments: dict[str, int]) -> None:
        signature = SIGNATURES[kernel]
        assert set(arguments) == {*signature.addresses, *signature.numbers}

        def run() -> None:
            known: dict[int, np.ndarray] = {}
            table = self._pointer(arguments["table"], known)
            words = table.array[table.offset_bytes :].view(np.int64)[: arguments["layers"] * 15].reshape(-1, 5)
            parts = [
                (self._pointer(n, known) if n else 0) if i < 2 else n
                for row in words.tolist()
                for i, n in enumerate(row)
            ]
            others = [self._pointer(arguments[name], known) for name in signature.addresses[1:]]
            numbers = [np.int32(arguments[name]) for name in signature.numbers]
            launch = row_launch(kernel, arguments["count"])
            spec = LaunchSpec(kernel, launch.grid, launch.threads, 0, [Words(parts), *others, *numbers])
            self._simulator.run([spec], 0)

        self._driver.queue(run)

    def _pointer(self, address: int, known: dict[int, np.ndarray]) -> Pointer:
        """Return where an address is in the GPU's memory."""
        for start, (buffer, kind) in self._driver.live.items():
            if kind == "device" and start <= address < start + len(buffer):
                view: Any = (ctypes.c_ubyte * len(buffer)).from_address(start)
                array = known.setdefault(start, np.frombuffer(view, np.uint8))
                return Pointer(array, address - start)
        raise AssertionError(f"{address:#x} is not in the GPU's memory")
