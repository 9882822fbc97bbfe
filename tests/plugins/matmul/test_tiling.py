"""Tiles, grids and launches of the matmuls with quantised weights, and what the compiler makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.cuda.architecture import ARCHITECTURES, KIB
from gta_edge.cuda.compiler import compile_program
from gta_edge.errors import BackendError
from gta_edge.plugins.domain import KERNELS
from gta_edge.plugins.matmul import packing
from gta_edge.plugins.matmul.launches import MAX_INPUTS, MAX_ROWS, plan_matmul, programs_for
from gta_edge.plugins.matmul.tiling import FEW_RESIDENT_WARPS, FEW_ROWS, Variant, few_launch, many_launch
from tests.helpers.matmul_cases import VARIANTS
from tests.helpers.nvrtc import ALL_COMPILES, BUILT_FOR, REGISTERS, needs_nvrtc
from tests.helpers.shared_memory import BLOCK_RESERVE, shared_limits

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)

architectures = st.sampled_from([*ARCHITECTURES, "sm_999"])
processors = st.integers(1, 200)
variants = st.sampled_from(list(VARIANTS.values()))
inputs = st.integers(1, 4000).map(lambda n: 8 * n)
sizes = st.integers(1, 200_000)

# Inputs and outputs of GTA-1B's matmuls: of a layer, those that share their input are one; and the head's.
GTA_1B = [(1280, 1792), (1280, 1280), (1280, 7168), (3584, 1280), (1280, 128256)]


# --- few rows ---------------------------------------------------------------------------------------------------------


@given(variants, architectures, processors, st.integers(1, FEW_ROWS), inputs, sizes)
@SETTINGS
def test_few_rows_fit_and_leave_no_warp_and_no_block_without_work(
    of: Variant, architecture: str, number: int, rows: int, in_features: int, out_features: int
) -> None:
    program = programs_for(of, architecture).few
    per_processor, per_block = shared_limits(architecture)
    launch = few_launch(program, number, rows, in_features, out_features)
    units, tiles = -(-in_features // 128), -(-out_features // 16)
    pitch = 256 * units + 16
    stages, unit = program.tile("GTA_FEW_STAGES"), program.tile("GTA_FEW_STAGE_BYTES")
    if launch is None:
        assert rows * pitch + stages * unit + 2 * rows * 64 > per_block
        return
    warps, (blocks, *others) = launch.threads // 32, launch.grid
    assert others == [1, 1]
    assert 1 <= warps <= program.tile("GTA_FEW_THREADS") // 32
    share = -(-units // warps)
    assert (warps - 1) * share < units <= warps * share  # the last warp has a unit
    assert launch.shared_bytes == rows * pitch + warps * stages * unit + 2 * warps * rows * 64
    assert launch.shared_bytes <= min(per_block, program.shared_bytes)
    per_block_tiles = -(-tiles // blocks)
    assert (blocks - 1) * per_block_tiles < tiles <= blocks * per_block_tiles  # shared out evenly
    assert launch.shared_bytes + BLOCK_RESERVE <= per_processor
    most_of_one = -(-blocks // number) * per_block_tiles
    assert most_of_one <= 2 * -(-tiles // number)  # no multiprocessor has much more than its part


@pytest.mark.parametrize("of", VARIANTS.values(), ids=str)
def test_a_units_bytes_are_those_of_the_packed_arrays(of: Variant) -> None:
    weight, scale = packing.packed_shapes(256, 16, of.bits, of.block_size)
    scales = scale[1] * scale[2] * scale[3] * scale[4] if of.block_size else 0
    assert 2 * of.unit_bytes == 4 * weight[1] * 128 + 2 * scales


@pytest.mark.parametrize(
    ("architecture", "number", "needed_kib"),
    [
        ("sm_87", 8, 16),
        ("sm_87", 16, 16),
        ("sm_110", 20, 24),
        ("sm_89", 128, 16),
        ("sm_80", 108, 32),
        ("sm_90", 132, 40),
    ],
)
@pytest.mark.parametrize("of", [Variant(4, 32, "bf16"), Variant(8, 0, "fp16")], ids=str)
@pytest.mark.parametrize("shape", GTA_1B)
def test_one_row_keeps_enough_bytes_in_flight(
    architecture: str, number: int, needed_kib: int, of: Variant, shape: tuple[int, int]
) -> None:
    """Bandwidth times latency of each multiprocessor, or else all that its one block has to read."""
    program = programs_for(of, architecture).few
    launch = few_launch(program, number, 1, *shape)
    assert launch is not None
    warps, units = launch.threads // 32, shape[0] // 128
    on_each = min(
        shared_limits(architecture)[0] // (launch.shared_bytes + BLOCK_RESERVE),
        max(1, FEW_RESIDENT_WARPS[8] // warps),
        -(-launch.grid[0] // number),
    )
    tiles_of_block = -(-(shape[1] // 16) // launch.grid[0])
    units_of_warp = -(-units // warps) * tiles_of_block
    ahead = min(program.tile("GTA_FEW_STAGES") - 1, units_of_warp)
    in_flight = on_each * warps * ahead * of.unit_bytes
    assert in_flight >= min(needed_kib * KIB, 0.7 * on_each * tiles_of_block * units * of.unit_bytes)
    # and there are as many blocks as multiprocessors, or a tile of outputs for each block
    assert launch.grid[0] >= min(number, shape[1] // 16)


# --- many rows --------------------------------------------------------------------------------------------------------


@given(variants, architectures, processors, st.integers(1, 5000), inputs, sizes)
@SETTINGS
def test_every_row_and_output_has_a_block(
    of: Variant, architecture: str, number: int, rows: int, in_features: int, out_features: int
) -> None:
    programs = programs_for(of, architecture)
    made = plan_matmul(programs, number, rows, in_features, (out_features,))
    assert made.program in programs.all
    assert made.kernel in made.program.kernels
    assert made.launch.shared_bytes <= made.program.shared_bytes <= shared_limits(architecture)[1]
    if made.program is programs.few:
        assert rows <= FEW_ROWS
        assert made.kernel == ("gta_matmul_8_rows" if rows <= 8 else "gta_matmul_16_rows")
        return
    x, y, z = made.launch.grid
    program = made.program
    assert (x - 1) * program.block_rows < rows <= x * program.block_rows
    assert (y - 1) * program.block_outputs < out_features <= y * program.block_outputs
    assert z == 1


@pytest.mark.parametrize("of", VARIANTS.values(), ids=str)
def test_the_tiles_are_sorted_and_their_shared_memory_is_counted(of: Variant) -> None:
    programs = programs_for(of, "sm_86").many
    areas = [program.block_rows * program.block_outputs for program in programs]
    assert areas == sorted(areas, reverse=True)
    for program in programs:
        stages = program.tile("GTA_MANY_STAGES") * 144  # 64 inputs, and 16 bytes against bank conflicts
        assert program.shared_bytes == program.block_rows * max(stages, 2 * program.block_outputs + 16)


def test_a_tile_is_chosen_by_what_it_leaves_idle() -> None:
    programs = programs_for(Variant(4, 128, "fp16"), "sm_90")

    def rows_of(number: int, rows: int, out_features: int) -> int:
        return plan_matmul(programs, number, rows, 1280, (out_features,)).program.block_rows

    assert rows_of(8, 512, 1280) == 128
    assert rows_of(132, 512, 1280) == 64  # 160 blocks, where wide ones are 40
    assert rows_of(132, 512, 128256) == 128
    assert rows_of(8, 30, 128256) == 32  # rows that there are not cost as much
    assert rows_of(8, 64, 128256) == 64


def test_the_border_between_few_and_many() -> None:
    programs = programs_for(Variant(8, 0, "fp16"), "sm_87")
    kernels = [plan_matmul(programs, 8, rows, 1280, (64,)).kernel for rows in (1, 8, 9, 16, 17)]
    assert kernels == ["gta_matmul_8_rows"] * 2 + ["gta_matmul_16_rows"] * 2 + ["gta_matmul"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((4, 32, "fp32"), "the kernels compute in fp16 or bf16, not in fp32"),
        ((2, 32, "fp16"), "the kernels have no weights of 2 bits; expected 4 or 8"),
        ((4, 0, "fp16"), "the kernels have no blocks of 0 weights of 4 bits; expected one of 32, 64, 128"),
        ((8, 16, "bf16"), "the kernels have no blocks of 16 weights of 8 bits; expected one of 0, 32, 64, 128"),
    ],
)
def test_variants_that_are_refused(arguments: tuple[int, int, str], text: str) -> None:
    with pytest.raises(BackendError) as error:
        Variant(*arguments)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"rows": 0}, f"x has 0 rows; expected 1 to {MAX_ROWS}"),
        ({"rows": MAX_ROWS + 1}, f"x has {MAX_ROWS + 1} rows; expected 1 to {MAX_ROWS}"),
        (
            {"in_features": 100},
            f"in_features is 100; expected a multiple of 8 up to {MAX_INPUTS}, so that x's rows begin at multiples of "
            "16 bytes: pad x and the weights with zeros",
        ),
        ({"in_features": 0}, "in_features is 0; expected a multiple of 8"),
        ({"in_features": MAX_INPUTS + 8}, "expected a multiple of 8 up to"),
        ({"output_sizes": ()}, "output_sizes is (); expected one to 4 sizes of at least 1"),
        ({"output_sizes": (16,) * 5}, "expected one to 4 sizes of at least 1"),
        ({"output_sizes": (16, 0)}, "output_sizes is (16, 0); expected one to 4 sizes of at least 1"),
        ({"output_sizes": (20, 16)}, "output_sizes is (20, 16); expected multiples of 16, but for the last one"),
        ({"output_sizes": (5_000_000,)}, "output_sizes add up to 5000000; expected at most 4194240"),
    ],
)
def test_sizes_that_are_refused(call: dict[str, object], text: str) -> None:
    programs = programs_for(Variant(4, 32, "fp16"), "sm_87")
    arguments = {"rows": 1, "in_features": 128, "output_sizes": (16,)} | call
    with pytest.raises(BackendError) as error:
        plan_matmul(programs, 8, **arguments)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "outputs"), [(MAX_ROWS, 1), (17, 4194240), (1, 4194240)])
def test_the_largest_sizes_have_a_grid(rows: int, outputs: int) -> None:
    for of in VARIANTS.values():
        programs = programs_for(of, "sm_90")
        for program in programs.many:
            x, y, _ = many_launch(program, rows, outputs).grid
            assert x * program.block_rows < 2**31
            assert y <= 65535
        assert plan_matmul(programs, 132, rows, MAX_INPUTS, (outputs,)).launch.grid[0] >= 1


# --- what the compiler makes of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """An empty cache of compiled kernels, of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GTA_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def compiles() -> list[object]:
    found = []
    for name, of in VARIANTS.items():
        for architecture in BUILT_FOR:
            usual = of.block_size in (0, 32) and architecture == "sm_87"
            is_default = usual or of == Variant(4, 32, "bf16")
            if ALL_COMPILES or is_default:
                found.append(pytest.param(of, architecture, id=f"{name}, {architecture}"))
    return found


@needs_nvrtc
@pytest.mark.parametrize(("of", "architecture"), compiles())
def test_every_variant_compiles_without_spilling(of: Variant, architecture: str) -> None:
    programs = programs_for(of, architecture)
    for program in programs.all:
        compiled = compile_program(program, architecture, KERNELS)
        assert set(compiled.resources) == set(program.kernels)
        assert "warning" not in compiled.log
        for kernel, takes in compiled.resources.items():
            assert (takes.spill_bytes, takes.stack_bytes, takes.shared_bytes) == (0, 0, 0), (kernel, takes)
            registers = -(-takes.registers // 8) * 8  # they are given out by eights
            if program is programs.few:
                rows = 8 if kernel == "gta_matmul_8_rows" else 16
                warps = max(FEW_RESIDENT_WARPS[rows], program.tile("GTA_FEW_THREADS") // 32)
            else:
                warps = many_launch(program, 1, 1).threads // 32
            assert registers * 32 * warps <= REGISTERS, (kernel, takes)


def test_the_sources_are_part_of_the_package() -> None:
    programs = programs_for(Variant(4, 32, "fp16"), "sm_87").all
    assert {program.source for program in programs} <= {path.name for path in KERNELS.iterdir()}
