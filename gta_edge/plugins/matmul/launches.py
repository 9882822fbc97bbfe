"""Launch plans of the matmul ops: which kernel one call launches, and with which arguments.

The one place that knows the order of the kernels' parameters. It needs no CUDA: ``kernels.py`` fills the names in with
device addresses, a simulation on the host with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gta_edge.cuda.architecture import MAX_GRID_YZ, Launch, Signature
from gta_edge.errors import BackendError
from gta_edge.plugins.matmul import tiling
from gta_edge.plugins.matmul.definition import MAX_OUTPUTS
from gta_edge.plugins.matmul.tiling import TILE_OUTPUTS, Program, Variant

__all__ = [
    "MAX_INPUTS",
    "MAX_ROWS",
    "SIGNATURE",
    "KernelLaunch",
    "Programs",
    "choose_many",
    "plan_matmul",
    "programs_for",
]

MAX_ROWS, MAX_INPUTS = 2**30, 2**24
_MAX_PADDING = 1.25
"""Rows with a tile's padding, as a factor of the fewest of all tiles."""

SIGNATURE = Signature(
    ("x", "weight", "scale", "bias", *(f"output_{i}" for i in range(MAX_OUTPUTS))),
    ("rows", "in_features", *(f"size_{i}" for i in range(MAX_OUTPUTS))),
)
"""The parameters of every kernel, as they stand in ``kernels/matmul_*.cu``."""


@dataclass(frozen=True)
class Programs:
    """All that is compiled for a variant on one kind of GPU."""

    few: Program
    many: tuple[Program, ...]
    """The widest tile first."""

    @property
    def all(self) -> tuple[Program, ...]:
        """Few rows and many."""
        return (self.few, *self.many)


@dataclass(frozen=True)
class KernelLaunch:
    """The one launch of a matmul: of which kernel, and on which grid."""

    program: Program
    kernel: str
    launch: Launch


def programs_for(variant: Variant, architecture: str) -> Programs:
    """Return all that is compiled for a variant.

    Args:
        variant: types of the weights and of x.
        architecture: of the GPU, ``"sm_87"``.
    """
    return Programs(tiling.few_program(variant, architecture), tiling.many_programs(variant, architecture))


def choose_many(candidates: tuple[Program, ...], processors: int, rows: int, out_features: int) -> Program:
    """Return the widest tile that has little padding and gives every multiprocessor a block, or the next."""
    padded = {program: -(-rows // program.block_rows) * program.block_rows for program in candidates}
    fitting = [program for program in candidates if padded[program] <= _MAX_PADDING * min(padded.values())]
    for program in fitting:
        x, y, _ = tiling.many_launch(program, rows, out_features).grid
        if x * y >= processors:
            return program
    return fitting[-1]


def plan_matmul(
    programs: Programs, processors: int, rows: int, in_features: int, output_sizes: Sequence[int]
) -> KernelLaunch:
    """Return what one matmul launches.

    Args:
        programs: of the variant.
        processors: multiprocessors of the GPU.
        rows: of x.
        in_features: K.
        output_sizes: widths of the matrices, which stand side by side along N.

    Raises:
        BackendError: a size that the kernels cannot take.
    """
    _check(rows, in_features, output_sizes)
    if rows <= tiling.FEW_ROWS:
        launch = tiling.few_launch(programs.few, processors, rows, in_features, sum(output_sizes))
        if launch is not None:
            return KernelLaunch(programs.few, programs.few.kernels[rows > tiling.ROW_TILE], launch)
    program = choose_many(programs.many, processors, rows, sum(output_sizes))
    return KernelLaunch(program, program.kernels[0], tiling.many_launch(program, rows, sum(output_sizes)))


def _check(rows: int, in_features: int, output_sizes: Sequence[int]) -> None:
    """Raise BackendError where a size is out of range."""
    if not 1 <= rows <= MAX_ROWS:
        raise BackendError(f"x has {rows} rows", f"expected 1 to {MAX_ROWS}")
    if in_features % 8 or not 8 <= in_features <= MAX_INPUTS:
        raise BackendError(
            f"in_features is {in_features}",
            f"expected a multiple of 8 up to {MAX_INPUTS}, so that x's rows begin at "
            "multiples of 16 bytes: pad x and the weights with zeros",
        )
    if not 1 <= len(output_sizes) <= MAX_OUTPUTS or min(output_sizes) < 1:
        raise BackendError(
            f"output_sizes is {tuple(output_sizes)}", f"expected one to {MAX_OUTPUTS} sizes of at least 1"
        )
    if any(size % TILE_OUTPUTS for size in output_sizes[:-1]):
        raise BackendError(
            f"output_sizes is {tuple(output_sizes)}", f"expected multiples of {TILE_OUTPUTS}, but for the last one"
        )
    most = MAX_GRID_YZ * TILE_OUTPUTS * 4  # of the narrowest tile's outputs
    if sum(output_sizes) > most:
        raise BackendError(f"output_sizes add up to {sum(output_sizes)}", f"expected at most {most}")
