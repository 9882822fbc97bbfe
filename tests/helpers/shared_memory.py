"""Shared memory that GPUs have."""

from gta_edge.cuda.architecture import ARCHITECTURES, KIB

BLOCK_RESERVE = KIB  # bytes of shared memory that the system takes of each block (CUDA C++ Programming Guide)


def shared_limits(architecture: str) -> tuple[int, int]:
    """Bytes of a multiprocessor and of a block; a GPU that is not known counts as the least of all."""
    per_processor, per_block = ARCHITECTURES.get(architecture, (100, 99))
    return per_processor * KIB, per_block * KIB
