"""PyTorch: how it says that there is no memory left."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gta_edge.libraries.optional import optional

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

__all__ = ["is_out_of_memory"]

_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|bad_alloc|bad allocation"
    # cuBLAS and cuDNN, which ask the driver for memory of their own
    "|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    # Where the driver has no NVML to tell how much is free, as on Tegra, the allocator fails over asking for it, before
    # it has said that there was no memory (https://github.com/pytorch/pytorch/issues/185240).
    "|NVML_SUCCESS == .*CUDACachingAllocator",
    re.DOTALL,
)
"""What torch says in a plain RuntimeError: on a CPU always, on a GPU where something else fails first."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is that there is no memory left, on a GPU or a CPU, in whatever form torch raises it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
