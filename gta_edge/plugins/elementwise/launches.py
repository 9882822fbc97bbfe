"""Launch plans of the kernels in ``kernels/elementwise.cu``: program, grids, and the order of the parameters."""

from __future__ import annotations

from dataclasses import dataclass

from gta_edge.cuda.architecture import MAX_INT32, WARP, Launch, Signature
from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import COMPUTE_TYPES

__all__ = [
    "ADD_NORM",
    "MAX_WIDTH",
    "SIGNATURES",
    "SILU_MULTIPLY",
    "VECTOR",
    "Program",
    "add_norm_launch",
    "silu_launch",
]

VECTOR = 8
"""Values that a thread reads at once."""

_MAX_THREADS = 1024
MAX_WIDTH = VECTOR * _MAX_THREADS
"""Of a row that is normalised: a block has it in registers."""

_SILU_THREADS = 64

ADD_NORM, SILU_MULTIPLY = "gta_add_norm", "gta_silu_multiply"
SIGNATURES = {
    ADD_NORM: Signature(("x", "addend", "weight", "sum", "normed"), ("width", "epsilon")),
    SILU_MULTIPLY: Signature(("gate", "up", "output"), ("vectors",)),
}
"""The parameters of each kernel; ``epsilon`` is float32."""


@dataclass(frozen=True)
class Program:
    """The source cut to one type.

    Args:
        compute: type of everything: ``fp16`` or ``bf16``.

    Raises:
        BackendError: the kernels do not compute in that type.
    """

    compute: str

    source = "elementwise.cu"
    kernels = (ADD_NORM, SILU_MULTIPLY)

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_TYPES:
            raise BackendError(f"the kernels compute in {' or '.join(COMPUTE_TYPES)}, not in {self.compute}")

    def defines(self) -> dict[str, int]:
        """Return the macros of the source."""
        return {"GTA_COMPUTE_BF16": int(self.compute == "bf16"), "GTA_ELEMENTWISE_THREADS": _MAX_THREADS}


def add_norm_launch(rows: int, width: int) -> Launch:
    """Return the launch of ``gta_add_norm``: a block a row.

    Raises:
        BackendError: a size that the kernel cannot take.
    """
    if not 1 <= rows <= MAX_INT32:
        raise BackendError(f"x has {rows} rows", f"expected 1 to {MAX_INT32}")
    if width % VECTOR or not VECTOR <= width <= MAX_WIDTH:
        raise BackendError(f"a row has {width} values", f"expected a multiple of {VECTOR} up to {MAX_WIDTH}")
    warps = -(-width // (VECTOR * WARP))
    return Launch((rows, 1, 1), WARP * warps, 4 * warps)


def silu_launch(values: int) -> Launch:
    """Return the launch of ``gta_silu_multiply``.

    Raises:
        BackendError: a number of values that the kernel cannot take.
    """
    if values % VECTOR or not VECTOR <= values <= VECTOR * (MAX_INT32 - _SILU_THREADS):
        raise BackendError(f"there are {values} values", f"expected a multiple of {VECTOR}")
    return Launch((-(-values // (VECTOR * _SILU_THREADS)), 1, 1), _SILU_THREADS)
