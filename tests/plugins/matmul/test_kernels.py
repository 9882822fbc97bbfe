"""The matmuls with quantised weights, on the host: the very sources, run by the simulation, against float64."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.model.presets import PRESETS, preset
from gta_edge.plugins.domain import KERNELS
from gta_edge.plugins.matmul.launches import SIGNATURE, KernelLaunch, plan_matmul, programs_for
from gta_edge.plugins.matmul.packing import pack
from gta_edge.plugins.matmul.tiling import Program, Variant, many_launch
from tests.helpers import matmul_cases as cases
from tests.helpers.kernel_simulator import LaunchSpec, SimulationError, Simulator, available, shared_directory
from tests.helpers.matmul_cases import matmuls

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler with sanitizers")

ARCHITECTURE = "sm_87"
INT4, INT8 = Variant(4, 32, "fp16"), Variant(8, 0, "bf16")


def simulator(program: Program, sources: Path = KERNELS) -> Simulator:
    return Simulator(sources / program.source, program.kernels, program.defines(), [sources])


@pytest.fixture(scope="session")
def builds() -> Path:
    """Where the programs lie: all of them, since two compilers take half the time of one."""
    directory = shared_directory()
    programs = [program for of in cases.VARIANTS.values() for program in programs_for(of, ARCHITECTURE).all]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda program: simulator(program).compile(directory), programs))
    return directory


def planned(case: cases.Case, processors: int, many: int | None, architecture: str = ARCHITECTURE) -> KernelLaunch:
    """What a call launches; ``many`` takes that program for many rows, however few there are."""
    programs, inputs = programs_for(case.variant, architecture), len(case.codes)
    if many is None:
        return plan_matmul(programs, processors, case.rows, inputs, case.output_sizes)
    program = programs.many[many]
    launch = many_launch(program, case.rows, sum(case.output_sizes))
    return KernelLaunch(program, program.kernels[0], launch)


def simulate(
    case: cases.Case,
    builds: Path,
    *,
    seed: int = 0,
    processors: int = 4,
    sources: Path = KERNELS,
    many: int | None = None,
    architecture: str = ARCHITECTURE,
) -> KernelLaunch:
    """Run a call on the case's arrays."""
    made = planned(case, processors, many, architecture)
    values = case.arrays | case.numbers()
    arguments = [values.get(name) for name in (*SIGNATURE.addresses, *SIGNATURE.numbers)]
    programme = simulator(made.program, sources)
    programme.compile(builds)
    launch = made.launch
    programme.run([LaunchSpec(made.kernel, launch.grid, launch.threads, launch.shared_bytes, arguments)], seed)
    return made


def check(case: cases.Case, builds: Path, **options: object) -> KernelLaunch:
    """Run a case, compare with float64, and see that nothing else was written."""
    inputs = ("x", "weight", "scale", "bias")
    before = {name: case.arrays[name].copy() for name in inputs if name in case.arrays}
    made = simulate(case, builds, **options)
    for i, (found, wanted) in enumerate(zip(case.outputs, cases.expected(case), strict=True)):
        error = cases.error(found, wanted)
        assert error <= cases.TOLERANCE[case.variant.compute], (i, error)
    for name, array in before.items():
        assert case.arrays[name].tobytes() == array.tobytes(), name
    return made


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [of for of in cases.VARIANTS.values() if of.compute == "fp16"], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(128, 16), (384, 53)])
def test_the_packing_is_that_of_the_definition(of, in_features, out_features):
    case = cases.make(of, 1, in_features, (out_features,))
    packed = pack(case.codes, case.scales, of.bits, of.block_size)
    weight, scale = cases.packed_by_definition(case.codes, case.scales, of.bits, of.block_size)
    assert np.array_equal(packed.weight, weight)
    assert np.array_equal(packed.scale, scale)


# --- against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.VARIANTS)
@pytest.mark.parametrize(
    ("rows", "in_features", "output_sizes", "processors"),
    [
        (1, 1280, (32, 16, 64, 37), 2),  # several tiles of a block
        (1, 128, (16,), 8),
        (2, 640, (5,), 8),
        (8, 384, (16, 40), 1),
        (13, 768, (48, 9), 3),
    ],
)
def test_few_rows(builds, name, rows, in_features, output_sizes, processors):
    made = check(cases.make(cases.VARIANTS[name], rows, in_features, output_sizes), builds, processors=processors)
    assert made.kernel == ("gta_matmul_8_rows" if rows <= 8 else "gta_matmul_16_rows")


@pytest.mark.parametrize("name", cases.VARIANTS)
@pytest.mark.parametrize(
    ("rows", "in_features", "output_sizes", "program"),
    [(1, 128, (3,), 2), (40, 384, (64, 16, 100), 0), (70, 256, (150,), 1), (33, 640, (80, 16, 16, 9), 2)],
)
def test_many_rows(builds, name, rows, in_features, output_sizes, program):
    case = cases.make(cases.VARIANTS[name], rows, in_features, output_sizes, bias=True)
    assert check(case, builds, many=program).kernel == "gta_matmul"


def short(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes that simulate quickly, and end as these do."""
    return tuple(min(size, 32 + size % 16) for size in sizes)


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("of", [INT4, INT8, Variant(4, 128, "bf16")], ids=str)
def test_the_products_of_every_preset(builds, of, rows):
    shapes = {
        (inputs, short(sizes)) for name in PRESETS for inputs, calls in matmuls(preset(name)).items() for sizes in calls
    }
    assert {inputs for inputs, _ in shapes} == {768, 1280, 1920, 3584}
    for inputs, sizes in sorted(shapes):
        check(cases.make(of, rows, inputs, sizes, seed=inputs), builds, processors=3)


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 9, 20])
@pytest.mark.parametrize("in_features", [8, 120, 136, 1288])
def test_inputs_that_are_no_multiple_of_128(builds, compute, rows, in_features):
    check(cases.make(Variant(8, 0, compute), rows, in_features, (16, 21), bias=True), builds)
    multiple = -(-in_features // 32) * 32
    check(cases.make(Variant(4, 32, compute), rows, multiple, (16, 21), bias=True), builds)


@pytest.mark.parametrize("rows", [17, 100, 300, 512])
def test_rows_up_to_hundreds(builds, rows):
    for of in (INT4, INT8):
        check(cases.make(of, rows, 160, (48, 20)), builds, processors=2)


@st.composite
def random_cases(draw: st.DrawFn) -> tuple[cases.Case, dict[str, object]]:
    of = draw(st.sampled_from(list(cases.VARIANTS.values())))
    rows = draw(st.one_of(st.integers(1, 16), st.integers(17, 150)))
    step = of.block_size or 8
    in_features = step * draw(st.integers(1, (2000 if rows <= 16 else 400) // step))
    sizes = [16 * draw(st.integers(1, 5)) for _ in range(draw(st.integers(0, 3)))] + [draw(st.integers(1, 70))]
    case = cases.make(of, rows, in_features, tuple(sizes), seed=draw(st.integers(0, 99)), bias=draw(st.booleans()))
    architecture = draw(st.sampled_from(["sm_80", "sm_86", "sm_90", "sm_999"]))
    options = {"processors": draw(st.integers(1, 40)), "seed": draw(st.integers(0, 99)), "architecture": architecture}
    return case, options


@given(random_cases())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_sizes_at_random(builds, drawn):
    case, options = drawn
    check(case, builds, **options)


def test_a_row_that_does_not_fit_the_shared_memory(builds):
    made = check(cases.make(INT8, 1, 60000, (20,)), builds, architecture="sm_86")
    assert made.kernel == "gta_matmul"


# --- hostile values ---------------------------------------------------------------------------------------------------

EVERYWHERE = [(1, None), (12, None), (20, 0), (20, 1), (20, 2)]


@pytest.mark.parametrize(("rows", "many"), EVERYWHERE)
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_scale_and_code(builds, rows, many, compute, bits):
    """A weight of -8 · 65504 leaves fp16's range, the matmul with a small x does not."""
    shape, of = (256, 32), Variant(bits, 32, compute)
    codes = np.full(shape, -(2 ** (bits - 1)), np.int8)
    scales = np.full((8, 32), 65504, np.float16)
    x = np.random.default_rng(0).uniform(0, 2.0**-18, (rows, 256))
    check(cases.make(of, rows, 256, (32,), codes=codes, scales=scales, x=x), builds, many=many)


@pytest.mark.parametrize(("rows", "many"), EVERYWHERE)
@pytest.mark.parametrize("of", [INT4, INT8], ids=str)
def test_the_smallest_scale_and_the_largest_x(builds, rows, many, of):
    scales = np.full((8, 32) if of.block_size else 32, 2.0**-24, np.float16)
    x = np.random.default_rng(0).choice([-65504.0, 65504.0], (rows, 256))
    check(cases.make(of, rows, 256, (32,), scales=scales, x=x), builds, many=many)


@pytest.mark.parametrize(("rows", "many"), EVERYWHERE)
def test_what_is_too_large_for_the_output_becomes_infinite(builds, rows, many):
    codes, scales = np.full((256, 32), 7, np.int8), np.full((8, 32), 65504, np.float16)
    codes[:, ::2] = -8
    x = np.random.default_rng(0).uniform(0, 1, (rows, 256))
    case = cases.make(INT4, rows, 256, (32,), codes=codes, scales=scales, x=x)
    simulate(case, builds, many=many)
    with np.errstate(over="ignore"):
        wanted = cases.expected(case)[0].astype(np.float16)
    assert np.isinf(wanted).all()
    assert np.array_equal(case.outputs[0], wanted)


@pytest.mark.parametrize(("rows", "many"), [(5, None), (12, None), (20, 0), (40, 1), (20, 2)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_no_number_spoils_no_other(builds, rows, many, value):
    case = cases.make(INT4, rows, 384, (16, 21))
    case.arrays["x"][2, 7] = value
    simulate(case, builds, many=many)
    others = np.arange(rows) != 2
    case.arrays["x"][2] = 0
    for found, wanted in zip(case.outputs, cases.expected(case), strict=True):
        assert not np.isfinite(found[2]).all()
        assert cases.error(found[others], wanted[others]) <= cases.TOLERANCE["fp16"]


@pytest.mark.parametrize(("rows", "many"), EVERYWHERE)
@pytest.mark.parametrize("of", list(cases.VARIANTS.values()), ids=str)
def test_every_code_is_exact(builds, of, rows, many):
    """x picks single weights; what comes out is code times scale, rounded once."""
    low = -(2 ** (of.bits - 1))
    codes = (np.arange(256 * 16).reshape(256, 16) * 7 % (-2 * low) + low).astype(np.int8)
    x = np.zeros((rows, 256))
    picked = np.random.default_rng(rows).integers(0, 256, rows)
    x[np.arange(rows), picked] = 1
    case = cases.make(of, rows, 256, (16,), codes=codes, x=x)
    simulate(case, builds, many=many)
    wanted = cases.expected(case)[0].astype(cases.TYPES[of.compute])
    assert np.array_equal(case.outputs[0], wanted)


# --- the same by other ways -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "many"), [(3, None), (16, None), (20, 0), (70, 1), (40, 2)])
@pytest.mark.parametrize("of", [INT4, INT8], ids=str)
def test_the_order_of_threads_and_blocks_changes_nothing(builds, of, rows, many):
    outputs = set()
    for seed in range(8):
        case = cases.make(of, rows, 640, (32, 20), bias=True)
        simulate(case, builds, seed=seed, many=many, processors=1)
        outputs.add(b"".join(output.tobytes() for output in case.outputs))
    assert len(outputs) == 1


@pytest.mark.parametrize("rows", [1, 11, 50])
def test_several_matrices_at_once_and_one_at_a_time(builds, rows):
    together = cases.make(INT4, rows, 512, (48, 16, 21))
    simulate(together, builds)
    ends = np.cumsum(together.output_sizes)
    for i, (size, end) in enumerate(zip(together.output_sizes, ends, strict=True)):
        own = slice(end - size, end)
        codes, scales = together.codes[:, own], together.scales[:, own]
        alone = cases.make(INT4, rows, 512, (size,), codes=codes, scales=scales, x=together.arrays["x"])
        simulate(alone, builds)
        error = cases.error(alone.outputs[0], together.outputs[i].astype(np.float64))
        assert error <= cases.ROUNDING["fp16"]


# --- faults are seen --------------------------------------------------------------------------------------------------

FEW, FEW_CHANNEL, MANY, MANY_CHANNEL = "few rows", "few rows, short inputs", "many rows", "many rows, short inputs"

# Where, what is there, what a fault makes of it, and what shows it.
FAULTS = {
    "a unit is not waited for": (
        "matmul_few.cu",
        "wait_for_copies<stages - 2>();\n            warp",
        "warp",
        FEW,
    ),
    "one stage too few is waited for": (
        "matmul_few.cu",
        "wait_for_copies<stages - 2>();\n            warp",
        "wait_for_copies<stages - 1>();\n            warp",
        FEW,
    ),
    "no barrier of the warp": ("matmul_few.cu", "warp_barrier();", "", FEW),
    "the warps' sums are read too early": (
        "matmul_few.cu",
        "block_barrier();\n        if (finishes",
        "if (finishes",
        FEW,
    ),
    "one place for the sums of all tiles": ("matmul_few.cu", "turn ^= 1;", "", FEW),
    "an output past the last is written": (
        "matmul_few.cu",
        "&& output < out_features;",
        "&& output <= out_features;",
        FEW,
    ),
    "a row past the last has sums": ("matmul_few.cu", "if (row < rows)", "if (row <= rows)", FEW),
    "an input past the last is read": (
        "matmul_few.cu",
        "input < in_features;",
        "input <= in_features;",
        FEW_CHANNEL,
    ),
    "the warps share out a unit too few": (
        "matmul_few.cu",
        "min_of(share, units - first)",
        "min_of(share, units - 1 - first)",
        FEW,
    ),
    "a block's scale is the next one's": (
        "matmul_few.cu",
        "(scales)[block];",
        "(scales)[block ^ 1];",
        FEW,
    ),
    "x is not waited for": ("matmul_many.cu", "wait_for_copies<stages - 2>();", "", MANY),
    "one stage of x too few is waited for": (
        "matmul_many.cu",
        "wait_for_copies<stages - 2>",
        "wait_for_copies<stages - 1>",
        MANY,
    ),
    "no barrier between the stages": ("matmul_many.cu", "block_barrier();  // all copies", "// all copies", MANY),
    "results replace x too early": ("matmul_many.cu", "block_barrier();  // x was", "// x was", MANY),
    "results are read too early": ("matmul_many.cu", "block_barrier();\n    write", "write", MANY),
    "a row past the last is read": ("matmul_many.cu", "i * row_step < rows &&", "", MANY),
    "a row past the last is written": ("matmul_many.cu", "if (row < rows &&", "if (row <= rows &&", MANY),
    "an input past the last of many is read": (
        "matmul_many.cu",
        "inputs > 0);",
        "inputs >= 0);",
        MANY_CHANNEL,
    ),
    "a tile past the last is read": ("matmul_many.cu", "+ i, last_tile)", "+ i, last_tile + 1)", MANY),
    "outputs past the last of many are written": ("matmul_many.cu", "min_of(8, out_features - output)", "8", MANY),
    "the halves of a unit are confused": (
        "matmul_many.cu",
        "stretches[1 - half], 1 - half)",
        "stretches[1 - half], half)",
        MANY,
    ),
    "an offset is wrong": ("weights.cuh", "0xd480d480u", "0xd4c0d4c0u", FEW),
    "a nibble is taken for its neighbour": ("weights.cuh", "nibbles >> 4 * i;", "nibbles >> 2 * i;", MANY),
    "the first of an output is that of the one before": ("weights.cuh", "output >= before)", "output > before)", FEW),
}


def fault_case(kind: str, seed: int) -> cases.Case:
    few = kind in (FEW, FEW_CHANNEL)
    if kind in (FEW_CHANNEL, MANY_CHANNEL):
        return cases.make(Variant(8, 0, "fp16"), 3 if few else 70, 264, (32, 37), seed=seed)
    # many: the widest tile, and inputs that end in the stage whose place results take first
    return cases.make(INT4, 3 if few else 100, 1280 if few else 640, (48, 37), seed=seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(builds, tmp_path, fault):
    file, there, instead, kind = FAULTS[fault]
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    text = (sources / file).read_text()
    assert text.count(there) == 1, "the planted fault no longer fits the source"
    (sources / file).write_text(text.replace(there, instead))
    for seed in range(10):
        try:
            check(fault_case(kind, seed), builds, seed=seed, processors=1, sources=sources)
        except (AssertionError, SimulationError):
            return
    pytest.fail(f"{fault}: ten runs of it passed")


@pytest.mark.parametrize("kind", [FEW, FEW_CHANNEL, MANY, MANY_CHANNEL])
def test_without_a_fault_the_same_passes(builds, kind):
    for seed in range(10):
        check(fault_case(kind, seed), builds, seed=seed, processors=1)
