"""Rows of caches as the kernels in ``kernels/cache_rows.cu`` take them: table, programs, grids, order of parameters.

What a layer has is a key, a latent (or value) and, where attention is observed, what its rows have received; of the
first two a scale for each row, where they are of 8 bits. ``moves``, ``folds`` and rotations are int32 [N, 4], columns
layer, sequence, source row, target row (of a rotation, row and which angles). Nothing here needs CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gta_edge.cuda.architecture import MAX_INT32, WARP, Launch, Signature
from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import COMPUTE_TYPES, ROW_CACHE_TYPES

__all__ = [
    "FOLD",
    "MAX_WIDTH",
    "MOVE",
    "ROTATE",
    "SIGNATURES",
    "LayerRows",
    "Part",
    "Program",
    "address_table",
    "check_lines",
    "fold_starts",
    "row_launch",
    "turned_rows",
]

MOVE, FOLD, ROTATE = "gta_cache_move", "gta_cache_fold", "gta_cache_rotate"
SIGNATURES = {
    MOVE: Signature(("table", "moves"), ("count", "layers", "batch")),
    FOLD: Signature(("table", "folds", "weights", "starts"), ("count", "layers", "batch")),
    ROTATE: Signature(("table", "rows", "cos", "sin"), ("count", "angles", "layers", "batch")),
}
"""The parameters of each kernel."""

_WARPS = 4
"""Rows that a block takes, a warp each."""
_PARTS = {MOVE: 3, FOLD: 2, ROTATE: 1}
"""Tensors of a layer that a kernel works on, the first ones."""
MAX_WIDTH = 256
"""Values of a row that is folded or rotated: a warp has it in registers."""

Lines = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Program:
    """The source cut to one type of cache.

    Args:
        compute: the 16-bit type of the model: ``fp16`` or ``bf16``.
        cache: type of the caches: the same, ``int8`` or ``fp8`` (e4m3).

    Raises:
        BackendError: the kernels have no such cache.
    """

    compute: str
    cache: str

    source = "cache_rows.cu"
    kernels = (MOVE, FOLD, ROTATE)

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_TYPES or self.cache not in (self.compute, *ROW_CACHE_TYPES):
            raise BackendError(f"the kernels have no cache of type {self.cache} of a model in {self.compute}")

    def defines(self) -> dict[str, int]:
        """Return the macros of the source."""
        return {
            "GTA_COMPUTE_BF16": int(self.compute == "bf16"),
            "GTA_CACHE_INT8": int(self.cache == "int8"),
            "GTA_CACHE_FP8": int(self.cache == "fp8"),
            "GTA_CACHE_VALUE_BITS": 0,
            "GTA_ROW_WARPS": _WARPS,
        }


@dataclass(frozen=True)
class Part:
    """One tensor [B, n, S, width] of a layer.

    Args:
        address: in the GPU's memory, a multiple of 16 if ``row_bytes`` is, else of 4.
        heads: n.
        row_bytes: of one head's row, a multiple of 4.
        capacity: S.
        scales: address of float32 [B, n, S]; 0 if it has none.
    """

    address: int
    heads: int
    row_bytes: int
    capacity: int
    scales: int = 0

    def __post_init__(self) -> None:
        alignment = 4 if self.row_bytes % 16 else 16
        if self.address % alignment or self.scales % 4:
            raise BackendError(
                f"a cache is at address {self.address:#x}, its scales at {self.scales:#x}",
                f"expected multiples of {alignment} and of 4",
            )
        if self.row_bytes < 4 or self.row_bytes % 4 or self.heads < 1 or not 1 <= self.capacity <= MAX_INT32:
            raise BackendError(
                f"a cache has {self.heads} heads of {self.capacity} rows of {self.row_bytes} bytes",
                "expected at least one of each, and a multiple of 4 bytes",
            )


@dataclass(frozen=True)
class LayerRows:
    """What the rows of one layer consist of."""

    key: Part
    latent: Part
    received: Part | None = None


def address_table(layers: Sequence[LayerRows]) -> npt.NDArray[np.int64]:
    """Return the kernels' table, int64 [L, 3, 5]: of key, latent and received what ``Part`` has."""
    table = np.zeros((len(layers), 3, 5), np.int64)
    for row, layer in zip(table, layers, strict=True):
        for place, part in enumerate((layer.key, layer.latent, layer.received)):
            if part is not None:
                row[place] = part.address, part.scales, part.heads, part.row_bytes, part.capacity
    return table


def row_launch(kernel: str, count: int) -> Launch:
    """Return a kernel's launch for so many lines (of folds, targets), a warp for each and each tensor.

    Raises:
        BackendError: there are none, or too many.
    """
    if not 1 <= count <= MAX_INT32 // 4:
        raise BackendError(f"there are {count} rows", f"expected 1 to {MAX_INT32 // 4}")
    return Launch((-(-count // _WARPS), _PARTS[kernel], 1), WARP * _WARPS)


def fold_starts(folds: Lines) -> Lines:
    """Return where the folds of each target begin, and how many folds there are: int32 [N + 1].

    Raises:
        BackendError: those of one target are not neighbours.
    """
    targets = folds[:, [0, 1, 3]]
    begins = np.flatnonzero(np.concatenate([[True], (targets[1:] != targets[:-1]).any(1)])[: len(folds)])
    if len(np.unique(targets[begins], axis=0)) < len(begins):
        raise BackendError("the folds of one target are apart", "expected them one after another")
    return np.append(begins, len(folds)).astype(np.int32)


def turned_rows(shifts: Sequence[npt.NDArray[np.int64]]) -> tuple[Lines, npt.NDArray[np.int64]]:
    """Return the rows whose keys are rotated, int32 [N, 4], and the distinct shifts that their last column counts.

    Args:
        shifts: of each layer by how many positions each row's key moves on, [B, S]; 0 where it stays.
    """
    values = np.concatenate([shift[shift != 0] for shift in shifts] or [np.zeros(0, np.int64)])
    distinct, which = np.unique(values, return_inverse=True)
    lines = np.empty((len(values), 4), np.int32)
    lines[:, 3] = which.reshape(-1)
    end = 0
    for layer, shift in enumerate(shifts):
        begin, end = end, end + int(np.count_nonzero(shift))
        lines[begin:end, 0] = layer
        lines[begin:end, 1], lines[begin:end, 2] = np.nonzero(shift)
    return lines, distinct


def check_lines(name: str, lines: Lines, capacities: Sequence[int], batch: int, *, targets: bool = True) -> None:
    """See that lines name rows that there are.

    Args:
        name: of the lines, in errors.
        lines: int32 [N, 4].
        capacities: S of each layer.
        batch: B.
        targets: whether the last column is a row, too.

    Raises:
        BackendError: they do not; a kernel would pass over the line.
    """
    if lines.ndim != 2 or lines.shape[1] != 4 or lines.dtype != np.int32:
        raise BackendError(f"{name} are {lines.dtype} {list(lines.shape)}", "expected int32 [N, 4]")
    layer, sequence, rows = lines[:, 0], lines[:, 1], lines[:, 2 : 3 + targets]
    inside = (layer >= 0) & (layer < len(capacities)) & (sequence >= 0) & (sequence < batch)
    limits = np.asarray(capacities, np.int64)[np.where(inside, layer, 0)]
    inside &= ((rows >= 0) & (rows < limits[:, None])).all(1)
    if not inside.all():
        raise BackendError(
            f"{name} have a line {lines[~inside][0].tolist()}",
            f"expected a layer below {len(capacities)}, a sequence below {batch}, and rows within the layer's capacity",
        )
