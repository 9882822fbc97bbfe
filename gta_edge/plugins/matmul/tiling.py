"""Tile sizes and grids of the matmul kernels, for a GPU: the one place that knows them.

A kernel is compiled for one ``Variant`` on one kind of GPU; rows, inputs and outputs are numbers of a launch, so few
programs serve all matmuls of all models. What is chosen here reaches the source as macros (``Program.defines``).
Nothing here needs CUDA, so that plans can be made anywhere.

Two ways to multiply, by the number of rows:

* few, up to ``FEW_ROWS``: reading the weights is what takes the time. A block takes tiles of 16 outputs in turn, its
  warps divide the inputs, and each keeps ``GTA_FEW_STAGES`` - 1 units of 128 inputs in flight.
* many, above: tiles of rows and outputs, whose x goes through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from gta_edge.cuda.architecture import BLOCK_RESERVE, WARP, Launch, pitch, shared_limits
from gta_edge.errors import BackendError
from gta_edge.numerics.dtypes import COMPUTE_TYPES
from gta_edge.plugins.matmul.packing import BLOCK_SIZES, INPUTS_MULTIPLE, OUTPUTS_MULTIPLE

__all__ = [
    "FEW_RESIDENT_WARPS",
    "FEW_ROWS",
    "ROW_TILE",
    "TILE_OUTPUTS",
    "Program",
    "Variant",
    "few_launch",
    "few_program",
    "many_launch",
    "many_programs",
]

FEW_ROWS = 16
"""Most rows for which every weight is read once: two tiles of a tensor core matmul."""

TILE_OUTPUTS, UNIT_INPUTS = OUTPUTS_MULTIPLE, INPUTS_MULTIPLE
ROW_TILE = 8

FEW_MAX_WARPS = 16
FEW_RESIDENT_WARPS = {8: 22, 16: 16}
"""Warps of a multiprocessor that there are registers for, by the rows that the kernel takes."""

FEW_MAX_RESIDENT = 8
"""Blocks of a multiprocessor: each copies x for itself."""

_START_TILES = 0.5
"""What a block takes to start, in terms of a tile: a guess, since nothing is measured."""

_SUM_BYTES = 2 * TILE_OUTPUTS * 4
"""Shared memory for a row of the sums of one warp: two tiles', in turn."""

# Warps along the outputs and along the rows; of each warp, tiles of 16 outputs and of 8 rows; stages. The widest first.
_WIDE, _WIDE_WITH_SHORT_BLOCKS = (4, 2, 2, 8, 3), (2, 4, 2, 4, 3)
_NARROW = ((4, 1, 1, 8, 4), (4, 1, 1, 4, 4))
_STAGE_INPUTS = 64


@dataclass(frozen=True)
class Variant:
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
class Program:
    """One source file cut to a variant and a GPU."""

    source: str
    """File name in ``kernels/``."""
    kernels: tuple[str, ...]
    tiles: tuple[tuple[str, int], ...]
    shared_bytes: int
    """Most dynamic shared memory of a launch."""
    processor_bytes: int
    """Shared memory of a multiprocessor."""
    variant: Variant

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


# --- few rows ---------------------------------------------------------------------------------------------------------


def few_program(variant: Variant, architecture: str) -> Program:
    """Return the tiles of the kernels for few rows.

    A warp's units in flight are about 3 KiB; 20 warps keep 60 KiB of weights in flight on a multiprocessor, more
    than bandwidth times latency of any GPU known here.
    """
    per_processor, per_block = shared_limits(architecture)
    tiles = {
        "GTA_FEW_STAGES": 4 if variant.bits == 4 else 3,
        "GTA_FEW_THREADS": WARP * FEW_MAX_WARPS,
        "GTA_FEW_STAGE_BYTES": variant.unit_bytes,
    }
    return Program(
        source="matmul_few.cu",
        kernels=("gta_matmul_8_rows", "gta_matmul_16_rows"),
        tiles=tuple(tiles.items()),
        shared_bytes=per_block,
        processor_bytes=per_processor,
        variant=variant,
    )


def few_launch(program: Program, processors: int, rows: int, in_features: int, out_features: int) -> Launch | None:
    """Return the launch for few rows, None where x does not fit the shared memory beside the weights' stages.

    The inputs are divided among so many warps that most are busy on a multiprocessor: in many small blocks or, where
    there is about one tile of outputs for each multiprocessor, in one large block.
    """
    units, tiles = _ceil_div(in_features, UNIT_INPUTS), _ceil_div(out_features, TILE_OUTPUTS)
    max_resident = FEW_RESIDENT_WARPS[ROW_TILE if rows <= ROW_TILE else FEW_ROWS]
    best, busiest = None, 0.0
    for warps in range(1, FEW_MAX_WARPS + 1):  # of equals the first: fewer sums to add
        share = _ceil_div(units, warps)
        if warps != _ceil_div(units, share):  # some would have nothing to do
            continue
        warp_bytes = program.tile("GTA_FEW_STAGES") * program.variant.unit_bytes + rows * _SUM_BYTES
        shared_bytes = rows * pitch(2 * UNIT_INPUTS * units) + warps * warp_bytes
        if shared_bytes > program.shared_bytes:
            break
        resident = min(
            program.processor_bytes // (shared_bytes + BLOCK_RESERVE), max_resident // warps, FEW_MAX_RESIDENT
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


def many_programs(variant: Variant, architecture: str) -> tuple[Program, ...]:
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
            Program("matmul_many.cu", ("gta_matmul",), tuple(tiles.items()), shared_bytes, per_processor, variant)
        )
    return tuple(programs)


def many_launch(program: Program, rows: int, out_features: int) -> Launch:
    """Return the launch for many rows: tiles of rows, which meet the same weights one after the other; of outputs."""
    threads = WARP * program.tile("GTA_MANY_OUTPUT_WARPS") * program.tile("GTA_MANY_ROW_WARPS")
    grid = (_ceil_div(rows, program.block_rows), _ceil_div(out_features, program.block_outputs), 1)
    return Launch(grid, threads, program.shared_bytes)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
