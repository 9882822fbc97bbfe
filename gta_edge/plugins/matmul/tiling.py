"""How the matmuls with quantised weights are cut to a GPU: the one place that knows their tiles, grids and launches.

A kernel is compiled for one ``MatMulVariant``; rows, inputs and outputs are numbers of a launch, so a few programs
serve all matmuls of all models. Nothing here needs CUDA, so that plans can be made anywhere.

Two ways to multiply, by the number of rows:

* few, up to ``FEW_ROWS``: reading the weights is what takes the time. A block takes tiles of 16 outputs in turn, its
  warps divide the inputs, and each keeps ``GTA_FEW_STAGES`` - 1 units of 128 inputs on their way.
* many, above: tiles of rows and outputs, whose x goes through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gta_edge.cuda.architecture import BLOCK_RESERVE, MAX_GRID_YZ, WARP, Launch, Signature, pitch, shared_limits
from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import COMPUTE_TYPES

__all__ = [
    "BLOCK_SIZES",
    "FEW_ROWS",
    "MATMUL_SIGNATURE",
    "MAX_OUTPUTS",
    "MatMulLaunch",
    "MatMulProgram",
    "MatMulPrograms",
    "MatMulVariant",
    "few_launch",
    "few_program",
    "many_launch",
    "many_programs",
    "matmul_programs",
    "plan_matmul",
]

BLOCK_SIZES = {4: (32, 64, 128), 8: (0, 32, 64, 128)}
"""Inputs that share a scale, by the bits of a code; 0 is one scale for each output."""

FEW_ROWS = 16
"""Most rows for which every weight is read once: two tiles of a tensor core product."""

MAX_OUTPUTS = 4
MAX_ROWS, MAX_INPUTS = 2**30, 2**24

TILE_OUTPUTS = 16
UNIT_INPUTS = 128
ROW_TILE = 8

FEW_MOST_WARPS = 16
FEW_RESIDENT_WARPS = {8: 22, 16: 16}
"""Warps of a multiprocessor that there are registers for, by the rows that the kernel takes."""

FEW_MOST_RESIDENT = 8
"""Blocks of a multiprocessor: each copies x for itself."""

_START_TILES = 0.5
"""What a block takes to start, in terms of a tile: a guess, since nothing is measured."""

_SUM_BYTES = 2 * TILE_OUTPUTS * 4
"""Shared memory for a row of the sums of one warp: two tiles', in turn."""

# Warps along the outputs and along the rows; of each warp, tiles of 16 outputs and of 8 rows; stages. The widest first.
_WIDE, _WIDE_WITH_SHORT_BLOCKS = (4, 2, 2, 8, 3), (2, 4, 2, 4, 3)
_NARROW = ((4, 1, 1, 8, 4), (4, 1, 1, 4, 4))
_STAGE_INPUTS = 64
_MAX_PADDING = 1.25
"""Rows that a tile may multiply in vain, as a factor of the least."""

MATMUL_SIGNATURE = Signature(
    ("x", "weight", "scale", "bias", *(f"output_{i}" for i in range(MAX_OUTPUTS))),
    ("rows", "in_features", *(f"size_{i}" for i in range(MAX_OUTPUTS))),
)
"""The parameters of every kernel here."""


@dataclass(frozen=True)
class MatMulVariant:
    """What a kernel is compiled for.

    Args:
        bits: of a weight: 4 or 8.
        block_size: inputs that share a scale: 32, 64 or 128; of 8 bits also 0, one scale for each output.
        compute: type of x, the bias and the outputs: ``fp16`` or ``bf16``.

    Raises:
        BackendError: the kernels cannot do this; the message lists what they can.
    """

    bits: int
    block_size: int
    compute: str

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE_TYPES:
            raise BackendError(f"the kernels compute in {' or '.join(COMPUTE_TYPES)}, not in {self.compute}")
        if self.bits not in BLOCK_SIZES:
            raise BackendError(f"the kernels have no weights of {self.bits} bits", "expected 4 or 8")
        if self.block_size not in BLOCK_SIZES[self.bits]:
            raise BackendError(
                f"the kernels have no blocks of {self.block_size} weights of {self.bits} bits",
                f"expected one of {', '.join(map(str, BLOCK_SIZES[self.bits]))}",
            )

    @property
    def unit_bytes(self) -> int:
        """Bytes of 16 outputs' weights and scales for 128 inputs."""
        scales = UNIT_INPUTS // self.block_size if self.block_size else 0
        return TILE_OUTPUTS * (UNIT_INPUTS * self.bits // 8 + 2 * scales)

    def defines(self) -> dict[str, int]:
        """Return the macros that specialise the source to this variant."""
        return {
            "GTA_COMPUTE_BF16": int(self.compute == "bf16"),
            "GTA_CODE_BITS": self.bits,
            "GTA_BLOCK_SIZE": self.block_size,
        }


@dataclass(frozen=True)
class MatMulProgram:
    """One source file cut to a variant and a GPU."""

    source: str
    """File name in ``kernels/``."""
    kernels: tuple[str, ...]
    tiles: tuple[tuple[str, int], ...]
    shared_bytes: int
    """Most dynamic shared memory of a launch."""
    processor_bytes: int
    """Shared memory of a multiprocessor."""
    variant: MatMulVariant

    def defines(self) -> dict[str, int]:
        """Return all macros of the source."""
        return self.variant.defines() | dict(self.tiles)

    def tile(self, name: str) -> int:
        """Return one of ``tiles``."""
        return dict(self.tiles)[name]

    @property
    def block_rows(self) -> int:
        """Rows of a block, of a program for many."""
        return ROW_TILE * self.tile("GTA_MANY_ROW_TILES") * self.tile("GTA_MANY_ROW_WARPS")

    @property
    def block_outputs(self) -> int:
        """Outputs of a block, of a program for many."""
        return TILE_OUTPUTS * self.tile("GTA_MANY_OUTPUT_TILES") * self.tile("GTA_MANY_OUTPUT_WARPS")


@dataclass(frozen=True)
class MatMulPrograms:
    """All that is compiled for a variant on one kind of GPU."""

    few: MatMulProgram
    many: tuple[MatMulProgram, ...]
    """The widest tile first."""

    @property
    def all(self) -> tuple[MatMulProgram, ...]:
        """For few rows and for many."""
        return (self.few, *self.many)


@dataclass(frozen=True)
class MatMulLaunch:
    """The one launch of a matmul: of which kernel, and on which grid."""

    program: MatMulProgram
    kernel: str
    launch: Launch


def matmul_programs(variant: MatMulVariant, architecture: str) -> MatMulPrograms:
    """Return all that is compiled for a variant.

    Args:
        variant: types of the weights and of x.
        architecture: of the GPU, ``"sm_87"``.
    """
    return MatMulPrograms(few_program(variant, architecture), many_programs(variant, architecture))


def plan_matmul(
    programs: MatMulPrograms, processors: int, rows: int, in_features: int, output_sizes: Sequence[int]
) -> MatMulLaunch:
    """Return what one matmul launches.

    Args:
        programs: of the variant.
        processors: multiprocessors of the GPU.
        rows: of x.
        in_features: K.
        output_sizes: of the matrices that lie side by side along N.

    Raises:
        BackendError: a size that the kernels cannot take.
    """
    _check(rows, in_features, output_sizes)
    if rows <= FEW_ROWS:
        launch = few_launch(programs.few, processors, rows, in_features, sum(output_sizes))
        if launch is not None:
            return MatMulLaunch(programs.few, programs.few.kernels[rows > ROW_TILE], launch)
    program = _choose_many(programs.many, processors, rows, sum(output_sizes))
    return MatMulLaunch(program, program.kernels[0], many_launch(program, rows, sum(output_sizes)))


# --- few rows ---------------------------------------------------------------------------------------------------------


def few_program(variant: MatMulVariant, architecture: str) -> MatMulProgram:
    """Return how the kernels for few rows are cut.

    A warp's units on their way are about 3 KiB; 20 warps keep 60 KiB of weights in flight on a multiprocessor, more
    than bandwidth times latency of any GPU known here.
    """
    per_processor, per_block = shared_limits(architecture)
    tiles = {
        "GTA_FEW_STAGES": 4 if variant.bits == 4 else 3,
        "GTA_FEW_THREADS": WARP * FEW_MOST_WARPS,
        "GTA_FEW_STAGE_BYTES": variant.unit_bytes,
    }
    return MatMulProgram(
        source="matmul_few.cu",
        kernels=("gta_matmul_8_rows", "gta_matmul_16_rows"),
        tiles=tuple(tiles.items()),
        shared_bytes=per_block,
        processor_bytes=per_processor,
        variant=variant,
    )


def few_launch(
    program: MatMulProgram, processors: int, rows: int, in_features: int, out_features: int
) -> Launch | None:
    """Return the launch for few rows, None where x does not fit the shared memory beside the weights' stages.

    The inputs are divided among so many warps that most are busy on a multiprocessor: in many small blocks or, where
    there is about one tile of outputs for each multiprocessor, in one large block.
    """
    units, tiles = _ceil_div(in_features, UNIT_INPUTS), _ceil_div(out_features, TILE_OUTPUTS)
    most_resident = FEW_RESIDENT_WARPS[ROW_TILE if rows <= ROW_TILE else FEW_ROWS]
    best, busiest = None, 0.0
    for warps in range(1, FEW_MOST_WARPS + 1):  # of equals the first: fewer sums to add
        share = _ceil_div(units, warps)
        if warps != _ceil_div(units, share):  # some would have nothing to do
            continue
        warp_bytes = program.tile("GTA_FEW_STAGES") * program.variant.unit_bytes + rows * _SUM_BYTES
        shared_bytes = rows * pitch(2 * UNIT_INPUTS * units) + warps * warp_bytes
        if shared_bytes > program.shared_bytes:
            break
        resident = min(
            program.processor_bytes // (shared_bytes + BLOCK_RESERVE), most_resident // warps, FEW_MOST_RESIDENT
        )
        busy = min(resident, _ceil_div(tiles, processors)) * units / share
        if busy > busiest:
            blocks = _few_blocks(tiles, processors, resident)
            best, busiest = Launch((blocks, 1, 1), WARP * warps, shared_bytes), busy
    return best


def _few_blocks(tiles: int, processors: int, resident: int) -> int:
    """Return among how many blocks the tiles of outputs are shared out.

    At least as many as are resident at once, and so many that multiprocessors end together.
    """

    def time(tiles_of_block: int) -> float:
        blocks_of_processor = _ceil_div(_ceil_div(tiles, tiles_of_block), processors)
        return blocks_of_processor * (tiles_of_block + _START_TILES)

    choices = range(_ceil_div(tiles, processors * resident), 0, -1)  # of equals the first: fewer blocks
    return _ceil_div(tiles, min(choices, key=time))


# --- many rows --------------------------------------------------------------------------------------------------------


def many_programs(variant: MatMulVariant, architecture: str) -> tuple[MatMulProgram, ...]:
    """Return the programs for many rows, the widest tile first; scaling short blocks takes registers from the sums."""
    per_processor, _ = shared_limits(architecture)
    programs = []
    for cut in (_WIDE_WITH_SHORT_BLOCKS if variant.block_size == 32 else _WIDE, *_NARROW):
        output_warps, row_warps, output_tiles, row_tiles, stages = cut
        rows, outputs = ROW_TILE * row_tiles * row_warps, TILE_OUTPUTS * output_tiles * output_warps
        shared_bytes = rows * max(stages * pitch(2 * _STAGE_INPUTS), pitch(2 * outputs))
        tiles = {
            "GTA_MANY_OUTPUT_WARPS": output_warps,
            "GTA_MANY_ROW_WARPS": row_warps,
            "GTA_MANY_OUTPUT_TILES": output_tiles,
            "GTA_MANY_ROW_TILES": row_tiles,
            "GTA_MANY_STAGES": stages,
            "GTA_MANY_SHARED_BYTES": shared_bytes,
        }
        programs.append(
            MatMulProgram("matmul_many.cu", ("gta_matmul",), tuple(tiles.items()), shared_bytes, per_processor, variant)
        )
    return tuple(programs)


def many_launch(program: MatMulProgram, rows: int, out_features: int) -> Launch:
    """Return the launch for many rows: tiles of rows, which meet the same weights one after the other; of outputs."""
    threads = WARP * program.tile("GTA_MANY_OUTPUT_WARPS") * program.tile("GTA_MANY_ROW_WARPS")
    grid = (_ceil_div(rows, program.block_rows), _ceil_div(out_features, program.block_outputs), 1)
    return Launch(grid, threads, program.shared_bytes)


def _choose_many(candidates: tuple[MatMulProgram, ...], processors: int, rows: int, out_features: int) -> MatMulProgram:
    """Return the widest tile that multiplies few rows in vain and gives every multiprocessor a block, or the next."""
    padded = {program: _ceil_div(rows, program.block_rows) * program.block_rows for program in candidates}
    fitting = [program for program in candidates if padded[program] <= _MAX_PADDING * min(padded.values())]
    for program in fitting:
        x, y, _ = many_launch(program, rows, out_features).grid
        if x * y >= processors:
            return program
    return fitting[-1]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- what is refused --------------------------------------------------------------------------------------------------


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
