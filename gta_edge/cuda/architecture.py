"""What CUDA and its architectures set for all kernels: limits, shared memory, launches."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ARCHITECTURES",
    "BLOCK_RESERVE",
    "KIB",
    "MAX_GRID_YZ",
    "MAX_INT32",
    "WARP",
    "Launch",
    "Signature",
    "pitch",
    "resident_blocks",
    "shared_limits",
]

WARP = 32
MAX_GRID_YZ = 65535
"""Blocks of a grid along its second and third axis, on every GPU."""
MAX_INT32 = 2**31 - 1

KIB = 1024
BLOCK_RESERVE = KIB
"""Shared memory that the system keeps for itself per block, from SM 8.0 on."""

ARCHITECTURES = {
    "sm_80": (164, 163),
    "sm_86": (100, 99),
    "sm_87": (164, 163),
    "sm_89": (100, 99),
    "sm_90": (228, 227),
    "sm_100": (228, 227),
    "sm_103": (228, 227),
    "sm_110": (228, 227),
    "sm_120": (100, 99),
    "sm_121": (100, 99),
}
"""Shared memory in KiB per multiprocessor and per block (CUDA C++ Programming Guide, "Compute Capabilities")."""


@dataclass(frozen=True)
class Signature:
    """The parameters of one kernel by name: all addresses first, then int32 numbers and the float32 ``scale``."""

    addresses: tuple[str, ...]
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel's grid and block."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0


def pitch(row_bytes: int) -> int:
    """Return the distance of rows in shared memory: an odd number of 16-byte units, free of bank conflicts."""
    return (row_bytes // 16 | 1) * 16


def shared_limits(architecture: str) -> tuple[int, int]:
    """Return bytes of shared memory per multiprocessor and per block; unknown GPUs get the least of all known."""
    per_processor, per_block = ARCHITECTURES.get(architecture, (100, 99))
    return per_processor * KIB, per_block * KIB


def resident_blocks(shared_bytes: int, architecture: str) -> int:
    """Return how many blocks of this much shared memory a multiprocessor has room for."""
    return shared_limits(architecture)[0] // (shared_bytes + BLOCK_RESERVE)
