"""The simulation computes what PTX says, and a kernel that a GPU may run wrongly fails in it."""

import re
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.helpers.kernel_simulator import LaunchSpec, Pointer, SimulationError, Simulator, available, shared_directory

pytestmark = pytest.mark.skipif(not available(), reason="needs g++ with its sanitizers")

BF16 = ml_dtypes.bfloat16
SEEDS = range(20)
LANES = np.arange(32)
rng = np.random.default_rng(0)


@pytest.fixture(scope="session")
def builds():
    return shared_directory()


@pytest.fixture
def kernel(tmp_path, builds):
    """A function that runs a kernel: its parameters and body, then how it is launched."""

    def make(parameters, body, before="", **defines):
        source = tmp_path / "kernel.cu"
        source.write_text(
            f"#include <primitives.cuh>\nusing namespace gta;\n{before}\n"
            f"GTA_KERNEL(128) kernel({parameters}) {{\n{body}\n}}\n"
        )
        simulator = Simulator(source, ["kernel"], defines)
        simulator.compile(builds)

        def run(*args, grid=(1,), threads=32, shared=0, seed=0, races=True):
            replace(simulator, races_are_faults=races).run([LaunchSpec("kernel", grid, threads, shared, args)], seed)

        return run

    return make


def elementwise(kernel, expression, out, *columns):
    """`expression` of a[i], b[i], c[i] for each i."""
    names = "abc"[: len(columns)]
    types = {"float32": "float", "uint32": "u32", "uint16": "u16", "int32": "int"}
    parameters = [f"const {types[x.dtype.name]}* {name}" for name, x in zip(names, columns, strict=True)]
    run = kernel(
        f"{types[out.dtype.name]}* out, int n, {', '.join(parameters)}",
        f"for (u32 i = threadIdx.x; i < u32(n); i += blockDim.x) out[i] = {expression};",
    )
    run(out, len(out), *columns)
    return out


def bit_patterns(count, width):
    """Bit patterns of floats: special ones, and random ones whose exponents are all as frequent."""
    if width == 16:
        return np.arange(1 << 16, dtype=np.uint16)
    special = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x33000000, 0x33000001]
    special += [0x477FEFFF, 0x477FF000, 0x387FC000, 0x387FE000, 0x387FFFFF, 0x3F808000, 0x3F818000, 0x7F7F8000]
    special = np.array(special, np.uint32)
    near_16_bits = rng.integers(0, 1 << 16, count, np.uint32) << 16 | rng.choice([0, 0x1000, 0x8000, 0x7FFF], count)
    return np.concatenate(
        [special, special | 0x80000000, rng.integers(0, 1 << 32, count, np.uint32), near_16_bits]
    ).astype(np.uint32)


def halves(packed, dtype=np.uint16):
    return packed.view(np.uint16).reshape(-1, 2).view(dtype)


def assert_same(actual, expected):
    """Bit for bit, except that any NaN is as good as another."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    unsigned = f"u{actual.itemsize}"
    np.testing.assert_array_equal(actual.view(unsigned)[~nan], expected.view(unsigned)[~nan])


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", BF16)])
def test_floats_are_rounded_to_pairs(kernel, name, dtype):
    low = bit_patterns(5000, 32).view(np.float32)
    high = rng.permutation(low)
    packed = elementwise(kernel, f"pack_{name}(a[i], b[i])", np.zeros(len(low), np.uint32), low, high)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.stack([low.astype(dtype), high.astype(dtype)], -1)
    assert_same(halves(packed, dtype), expected)


def test_a_nan_becomes_the_canonical_one(kernel):
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    for name in ("f16", "bf16"):
        packed = elementwise(kernel, f"pack_{name}(a[i], a[i])", np.zeros(2, np.uint32), nan)
        np.testing.assert_array_equal(packed, 0x7FFF7FFF)


def test_all_f16_are_widened(kernel):
    bits = bit_patterns(0, 16)
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float16).astype(np.float32)
    assert_same(elementwise(kernel, "unpack_f16(a[i])", np.zeros(len(bits), np.float32), bits), expected)


def nearest(value, dtype):
    """An exact, finite sum in a 16-bit format, by comparing the neighbours of a first guess."""
    with np.errstate(over="ignore"):
        guess = np.array(float(value), np.float64).astype(np.float32).astype(dtype)
    bits = int(guess.view(np.uint16)) & 0x7FFF
    largest = int(np.array(ml_dtypes.finfo(dtype).max, dtype).view(np.uint16))

    def exact(pattern):  # what follows the largest number, were there no infinity
        if pattern <= largest:
            return Fraction(float(np.uint16(pattern).view(dtype)))
        return 2 * exact(largest) - exact(largest - 1)

    candidates = [b for b in (bits - 1, bits, bits + 1) if 0 <= b <= largest + 1]
    return min(candidates, key=lambda b: (abs(exact(b) - abs(value)), b & 1))


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", BF16)])
def test_fma_rounds_once(kernel, name, dtype):
    a, b, c = rng.integers(0, 1 << 32, (3, 8000), np.uint32)
    if name == "bf16":
        # 1.0078125 * 1.0078125 and the like are near the middle of two numbers; a tiny c decides.
        a[:4000] = 0x3F803F80 | rng.integers(0, 128, 4000, np.uint32) * 0x10001
        b[:4000] = 0x3F803F80 | rng.integers(0, 128, 4000, np.uint32) * 0x10001
        c[:4000] &= 0x87FF87FF
    actual = halves(elementwise(kernel, f"fma_{name}x2(a[i], b[i], c[i])", np.zeros(8000, np.uint32), a, b, c)).reshape(
        -1
    )
    x, y, z = (halves(v, dtype).reshape(-1) for v in (a, b, c))
    ties = 0
    for p, q, r, got in zip(x, y, z, actual, strict=True):
        p, q, r = float(p), float(q), float(r)
        if not np.isfinite([p, q, r]).all():
            with np.errstate(invalid="ignore"):
                expected = np.float64(p) * q + r
            result = np.uint16(got).view(dtype).astype(np.float64)
            assert np.array_equal(result, expected, equal_nan=True)
            continue
        value = Fraction(p) * Fraction(q) + Fraction(r)
        if value:
            assert got == nearest(value, dtype) | (0x8000 if value < 0 else 0), (p, q, r)
            with np.errstate(over="ignore"):
                double_rounding = np.array(p * q + r).astype(np.float32).astype(dtype).view(np.uint16)
            ties += int(double_rounding) != got
        else:
            assert got == (0x8000 if np.signbit(p * q + r) else 0)
    if name == "bf16":
        assert ties  # the sample has cases that two roundings get wrong


def test_fma_of_bf16_sees_what_a_double_drops(kernel):
    # (1 + 2^-4)(1 + 2^-4) + 2^-130 and its like: the product is the middle of two bf16.
    a, b = np.array([0x3F883F88], np.uint32), np.array([0x3F883F88], np.uint32)
    middle = Fraction(float(np.uint16(0x3F88).view(BF16))) ** 2
    assert middle * 2**8 % 2 == 1
    for tiny, expected in ((0x0001, 0x3F91), (0x8001, 0x3F90), (0x0000, 0x3F90)):
        c = np.array([tiny * 0x10001], np.uint32)
        assert (
            elementwise(kernel, "fma_bf16x2(a[i], b[i], c[i])", np.zeros(1, np.uint32), a, b, c)[0]
            == expected * 0x10001
        )


def test_approximations_are_near(kernel):
    x = np.concatenate([np.linspace(-140, 140, 4001), [0, 1e-40, -1e-40, np.inf, -np.inf, np.nan]]).astype(np.float32)
    out = np.zeros_like(x)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        power = np.exp2(x.astype(np.float64)).astype(np.float32)
        power[power < np.finfo(np.float32).tiny] = 0
        np.testing.assert_allclose(elementwise(kernel, "power_of_2(a[i])", out, x), power, rtol=3e-7)
        logarithm = np.log2(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(elementwise(kernel, "logarithm_2(a[i])", out, x), logarithm, rtol=3e-7, atol=1e-7)
        reciprocal = (1 / x.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(elementwise(kernel, "reciprocal(a[i])", out, x), reciprocal, rtol=3e-7)


def test_integers_are_nearest_even_and_saturate(kernel):
    x = [0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2.0**31), -(2.0**40), 2**31 - 128, np.inf, -np.inf, np.nan, 1e-40]
    expected = [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), -(2**31), 2**31 - 128, 2**31 - 1, -(2**31), 0, 0]
    actual = elementwise(kernel, "nearest_integer(a[i])", np.zeros(len(x), np.int32), np.array(x, np.float32))
    np.testing.assert_array_equal(actual, expected)


def test_bytes_are_picked(kernel):
    a, b = rng.integers(0, 1 << 32, (2, 4096), np.uint32)
    digits = np.stack([np.arange(4096) >> 3 * i & 7 for i in range(4)], -1)
    selector = (digits << 4 * np.arange(4)).sum(-1).astype(np.uint32)
    actual = elementwise(kernel, "pick_bytes(a[i], b[i], c[i])", np.zeros(4096, np.uint32), a, b, selector)
    both = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], -1)
    np.testing.assert_array_equal(actual.view(np.uint8).reshape(-1, 4), np.take_along_axis(both, digits, 1))
    with pytest.raises(SimulationError, match="0x3218"):
        elementwise(kernel, "pick_bytes(a[i], 0, 0x3218)", np.zeros(1, np.uint32), a[:1].copy())


def test_bits_are_kept(kernel):
    bits = bit_patterns(100, 32)
    actual = elementwise(kernel, "as_bits(as_float(a[i]))", np.zeros_like(bits), bits)
    np.testing.assert_array_equal(actual, bits)


# --- warps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [1, 2, 7, 16, 31])
def test_shuffles(kernel, mask):
    x = np.arange(64, dtype=np.float32)
    out = np.zeros_like(x)
    kernel("float* out, const float* x, int mask", "out[threadIdx.x] = shuffle_xor(x[threadIdx.x], mask);")(
        out, x, mask, threads=64
    )
    np.testing.assert_array_equal(out, x[np.arange(64) ^ mask])


def test_votes_are_of_one_warp(kernel):
    x = np.zeros(96, np.int32)
    x[40] = 5
    out = np.zeros_like(x)
    kernel("int* out, const int* x", "out[threadIdx.x] = any_of_warp(x[threadIdx.x] == 5);")(out, x, threads=96)
    np.testing.assert_array_equal(out, np.repeat([0, 1, 0], 32))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded(kernel, count, transposed):
    matrices = rng.integers(0, 1 << 16, (count, 8, 8), np.uint16)
    rows = rng.permutation(8 * count)  # where each row lies
    memory = np.zeros((8 * count, 8), np.uint16)
    memory[rows] = matrices.reshape(-1, 8)
    out = np.zeros((32, count), np.uint32)
    name = "load_matrices_transposed" if transposed else "load_matrices"
    body = f"""
        Vector* shared = reinterpret_cast<Vector*>(shared_memory());
        for (int i = threadIdx.x; i < {8 * count}; i += 32) shared[i] = memory[i];
        warp_barrier();
        u32 r[{count}];
        {name}(r, threadIdx.x < {8 * count} ? shared + rows[threadIdx.x] : nullptr);
        for (int i = 0; i < {count}; ++i) out[{count} * threadIdx.x + i] = r[i];"""
    kernel("u32* out, const Vector* memory, const int* rows", body)(
        out, memory, rows.astype(np.int32), shared=128 * count
    )
    for lane in LANES:
        for i, matrix in enumerate(matrices):
            row, column = lane // 4, 2 * (lane % 4)
            pair = matrix[[column, column + 1], row] if transposed else matrix[row, column : column + 2]
            np.testing.assert_array_equal(halves(out)[lane * count + i], pair)


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", BF16)])
def test_matrices_are_multiplied(kernel, name, dtype):
    a, b, c = rng.standard_normal((16, 16)), rng.standard_normal((16, 8)), rng.standard_normal((16, 8))
    a, b, c = a.astype(dtype), b.astype(dtype), c.astype(np.float32)
    a[0, :2] = ml_dtypes.finfo(dtype).smallest_subnormal
    a[1, 2], a[2, 3], a[3, 4] = np.inf, np.nan, -0.0
    a_registers = np.zeros((32, 4, 2), dtype)
    b_registers = np.zeros((32, 2, 2), dtype)
    c_registers = np.zeros((32, 4), np.float32)
    places = []
    for lane in LANES:
        g, p = lane // 4, lane % 4
        for k in range(2):
            a_registers[lane, :, k] = [a[row, col + k] for col in (2 * p, 2 * p + 8) for row in (g, g + 8)]
            b_registers[lane, :, k] = [b[row + k, g] for row in (2 * p, 2 * p + 8)]
        places.append([(g, 2 * p), (g, 2 * p + 1), (g + 8, 2 * p), (g + 8, 2 * p + 1)])
        c_registers[lane] = [c[place] for place in places[-1]]
    body = f"""
        const int lane = threadIdx.x;
        u32 x[4], y[2];
        float z[4];
        for (int i = 0; i < 4; ++i) x[i] = a[4 * lane + i], z[i] = c[4 * lane + i];
        for (int i = 0; i < 2; ++i) y[i] = b[2 * lane + i];
        mma_{name}(z, x, y);
        for (int i = 0; i < 4; ++i) c[4 * lane + i] = z[i];"""
    kernel("const u32* a, const u32* b, float* c", body)(a_registers, b_registers, c_registers)
    actual = np.zeros((16, 8), np.float32)
    for lane in LANES:
        for place, value in zip(places[lane], c_registers[lane], strict=True):
            actual[place] = value
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- asynchronous copies ----------------------------------------------------------------------------------------------

COPY = """
    u8* shared = shared_memory();
    const int bytes = SIZE, i = threadIdx.x;
    if (bytes == 16) copy_16_async(shared + 16 * i, i < valid ? from + 16 * i : from, i < valid);
    else copy_4_async(shared + 4 * i, i < valid ? from + 4 * i : from, i < valid);
    commit_copies();
    WAIT
    block_barrier();
    const int other = i ^ 33;
    for (int k = 0; k < bytes; ++k) out[bytes * other + k] = shared[bytes * other + k];"""


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_copies_arrive_and_invalid_ones_are_zeros(kernel, size, seed):
    data = rng.integers(1, 256, 40 * size, np.uint8)  # threads beyond read nothing, or would read past the end
    out = np.zeros(64 * size, np.uint8)
    run = kernel("u8* out, const u8* from, int valid", COPY.replace("WAIT", "wait_for_copies<0>();"), SIZE=size)
    run(out, data, 40, threads=64, shared=64 * size, seed=seed)
    np.testing.assert_array_equal(out, np.concatenate([data, np.zeros(24 * size, np.uint8)]))


def wrong_seeds(run, out, expected, *args, seeds=SEEDS, **launch):
    """The seeds for which the result is wrong, or which end in a fault."""
    wrong = []
    for seed in seeds:
        out[...] = 0
        try:
            run(out, *args, **launch, seed=seed)
            is_wrong = not np.array_equal(out, expected)
        except SimulationError as error:
            is_wrong = "race: this thread" in str(error)
        if is_wrong:
            wrong.append(seed)
    return wrong


def assert_detected(run, out, expected, *args, **launch):
    """Most orders give wrong results; what was read and written in the wrong order is a fault for every order."""
    assert len(wrong_seeds(run, out, expected, *args, **launch, races=False)) > 10
    assert wrong_seeds(run, out, expected, *args, **launch, seeds=range(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("wait", ["", "wait_for_copies<1>();"], ids=["none", "for too few"])
def test_a_missing_wait_gives_wrong_results(kernel, wait):
    data = rng.integers(1, 256, 64 * 16, np.uint8)
    out = np.zeros(64 * 16, np.uint8)
    run = kernel("u8* out, const u8* from, int valid", COPY.replace("WAIT", wait), SIZE=16)
    assert_detected(run, out, data, data, 64, threads=64, shared=64 * 16)


def test_a_wait_leaves_the_latest_groups_under_way(kernel):
    data = np.arange(1, 5, dtype=np.uint32)
    body = """
        u32* shared = reinterpret_cast<u32*>(shared_memory());
        for (int i = 0; i < 4; ++i) { shared[4 * threadIdx.x + i] = 0; }
        u32* own = shared + 4 * threadIdx.x;
        for (int i = 0; i < 4; ++i) { copy_4_async(own + i, from + i, true); commit_copies(); }
        wait_for_copies<2>();
        out[3 * threadIdx.x] = own[0] + own[1];
        out[3 * threadIdx.x + 1] = own[3];
        wait_for_copies<0>();
        out[3 * threadIdx.x + 2] = own[2] + own[3];"""
    run = kernel("u32* out, const u32* from", body)
    early = set()
    for seed in range(8):
        out = np.zeros((32, 3), np.uint32)
        run(out, data, shared=32 * 16, seed=seed, races=False)
        np.testing.assert_array_equal(out[:, 0], 3)
        np.testing.assert_array_equal(out[:, 2], 7)
        early |= set(out[:, 1].tolist())
    assert early == {0, 4}


# --- order ------------------------------------------------------------------------------------------------------------

REDUCTION = """
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int i = threadIdx.x;
    float sum = x[blockIdx.x * 128 + i];
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (i % 32 == 0) shared[i / 32] = sum;
    BARRIER
    if (i == 0) out[blockIdx.x] = shared[0] + shared[1] + shared[2] + shared[3];"""


def test_a_block_reduction_is_right_in_any_order(kernel):
    x = np.arange(4 * 128, dtype=np.float32)
    run = kernel("float* out, const float* x", REDUCTION.replace("BARRIER", "block_barrier();"))
    expected = x.reshape(4, 128).sum(-1)
    assert not wrong_seeds(run, np.zeros(4, np.float32), expected, x, grid=(4,), threads=128, shared=16)


def test_a_missing_block_barrier_gives_wrong_results(kernel):
    x = np.arange(128, dtype=np.float32)
    run = kernel("float* out, const float* x", REDUCTION.replace("BARRIER", ""))
    assert_detected(run, np.zeros(1, np.float32), x.sum(keepdims=True), x, threads=128, shared=16)


def test_a_missing_barrier_after_the_reading_gives_wrong_results(kernel):
    """The second round overwrites what slower warps still have to read in the first."""
    body = """
        float* shared = reinterpret_cast<float*>(shared_memory());
        const int i = threadIdx.x;
        float sum = 0;
        for (int round = 0; round < 2; ++round) {
            shared[i] = x[i] + round;
            block_barrier();
            sum += shuffle_xor(shared[127 - i], 1);
            BARRIER
        }
        out[i] = sum;"""
    x = np.arange(128, dtype=np.float32)
    expected = (2 * x[::-1] + 1)[np.arange(128) ^ 1]
    launch = {"threads": 128, "shared": 512}
    right = kernel("float* out, const float* x", body.replace("BARRIER", "block_barrier();"))
    assert not wrong_seeds(right, np.zeros(128, np.float32), expected, x, **launch)
    wrong = kernel("float* out, const float* x", body.replace("BARRIER", ""))
    assert_detected(wrong, np.zeros(128, np.float32), expected, x, **launch)


@pytest.mark.parametrize(
    "use", ["out[i] = shared[i ^ 1];", "u32 r[2]; load_matrices(r, shared + 4 * (i % 8)); out[i] = r[0];"]
)
def test_a_missing_warp_barrier_gives_wrong_results(kernel, use):
    body = f"""
        u32* shared = reinterpret_cast<u32*>(shared_memory());
        const int i = threadIdx.x;
        shared[i] = i;
        BARRIER
        {use}"""
    expected = LANES ^ 1 if "^" in use else LANES
    launch = {"shared": 128}
    right = kernel("u32* out", body.replace("BARRIER", "warp_barrier();"))
    assert not wrong_seeds(right, np.zeros(32, np.uint32), expected, **launch)
    wrong = kernel("u32* out", body.replace("BARRIER", ""))
    assert_detected(wrong, np.zeros(32, np.uint32), expected, **launch)


EITHER = "reads byte .* wrote it|writes byte .* read it"  # whichever thread comes second


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("s[i] = i; shuffle_xor(0, 1); out[i] = s[i ^ 1];", r"reads byte \d+ .*wrote it.*kernel.cu:6"),
        ("out[i] = s[i ^ 1]; any_of_warp(true); s[i] = i;", r"writes byte \d+ .*read it.*kernel.cu:6"),
        ("s[i / 2] = out[0];", "writes byte .* wrote it"),
        ("s[i] = i; warp_barrier(); out[i] = s[i ^ 32];", EITHER),
        ("out[i] = s[i ^ 32]; warp_barrier(); s[i] = i;", EITHER),
        ("out[i] = s[0]; warp_barrier(); if (i == 70) s[0] = i;", EITHER),
        ("copy_4_async(s + i, out, true); out[0] = s[i];", "reads byte .* copies to there"),
        ("copy_4_async(s + i, out, true); s[i] = 0;", "writes byte .* copies to there"),
        ("copy_4_async(s + i, out, true); copy_4_async(s + i, out, true);", "writes byte .* copies to there"),
        ("copy_4_async(s + i, out, true); wait_for_copies<0>(); out[0] = s[i];", "reads byte .* copies to there"),
        ("copy_4_async(s + i, out, true); commit_copies(); block_barrier(); out[i] = s[i];", "copies to there"),
        ("copy_4_async(s + i, out, true); commit_copies(); wait_for_copies<0>(); out[0] = s[i ^ 1];", "this thread"),
        ("out[i] = s[i ^ 1]; copy_4_async(s + i, out, true);", "byte .* (read it|copies to)"),
    ],
)
def test_races_are_faults_in_any_order(kernel, body, report):
    run = kernel("u32* out", "u32* s = reinterpret_cast<u32*>(shared_memory());\nconst int i = threadIdx.x; " + body)
    for seed in range(2):
        with pytest.raises(SimulationError, match=report):
            run(np.zeros(128, np.uint32), threads=128, shared=512, seed=seed)


@pytest.mark.parametrize(
    "body",
    [
        "u16* half = reinterpret_cast<u16*>(s); half[i] = out[0];",
        "out[i] = s[0] + s[i ^ 1] + s[i ^ 32]; block_barrier(); s[i ^ 5] = 1; block_barrier(); s[i] += s[i];",
        "s[i] = i; warp_barrier(); out[i] = s[i ^ 1]; warp_barrier(); s[i] = 1; warp_barrier(); s[i ^ 3] = 2;",
        "s[i ^ 32] = i; block_barrier(); out[i] = s[i ^ 1]; warp_barrier(); s[i] = 1;",
        "s[i] = 0; copy_4_async(s + i, out, true); commit_copies(); wait_for_copies<0>(); s[i] += 1;",
        "for (int k = 0; k < 3; ++k) { copy_4_async(s + i, out, true); commit_copies(); wait_for_copies<0>(); "
        "block_barrier(); out[i] = s[i ^ 33]; block_barrier(); }",
    ],
)
def test_accesses_with_barriers_between_are_no_races(kernel, body):
    run = kernel("u32* out", "u32* s = reinterpret_cast<u32*>(shared_memory());\nconst int i = threadIdx.x; " + body)
    for seed in range(4):
        run(np.zeros(128, np.uint32), grid=(2,), threads=128, shared=512, seed=seed)


def test_blocks_run_in_any_order(kernel):
    run = kernel(
        "int* out, int* next",
        "if (threadIdx.x == 0) out[(*next)++] = blockIdx.x + 10 * (blockIdx.y + 10 * blockIdx.z);",
    )
    orders = set()
    for seed in range(4):
        out, count = np.zeros(12, np.int32), np.zeros(1, np.int32)
        run(out, count, grid=(3, 2, 2), seed=seed)
        assert sorted(out.tolist()) == sorted(
            x + 10 * y + 100 * z for x in range(3) for y in range(2) for z in range(2)
        )
        orders.add(tuple(out.tolist()))
    assert len(orders) == 4


def test_the_same_seed_gives_the_same_run(kernel):
    x = np.arange(128, dtype=np.float32)
    run = kernel("float* out, const float* x", REDUCTION.replace("BARRIER", ""))
    for seed in range(3):
        results = []
        for _ in range(2):
            out = np.zeros(1, np.float32)
            run(out, x, threads=128, shared=16, seed=seed, races=False)
            results.append(out.tobytes())
        assert results[0] == results[1]


# --- what a GPU may stumble over --------------------------------------------------------------------------------------


MMA = "float c[4] = {};\nu32 a[4] = {}, b[2] = {};\n"


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("x[0] = x[N];", "heap-buffer-overflow"),
        ("x[N] = 0;", "heap-buffer-overflow"),
        ("x[0] = x[-1];", "heap-buffer-overflow"),
        ("x[0] = *reinterpret_cast<u8*>(x + N);", "heap-buffer-overflow"),
        ("shared_memory()[BYTES] = 0;", "heap-buffer-overflow"),
        ("x[0] = shared_memory()[BYTES];", "heap-buffer-overflow"),
        ("x[0] = int(empty[0]);", "use-after-poison"),
        ("x[0] = nothing[0];", "null pointer"),
        ("*reinterpret_cast<Vector*>(x) = reinterpret_cast<Vector*>(x + 1)[0];", "misaligned address"),
        ("x[0] = 0x7fffffff; x[1] = x[0] + x[3];", "signed integer overflow"),
        ("x[1] = 1 << x[2];", "shift exponent 77"),
        ("x[1] = int(3e9f * x[3]);", "outside the range of representable values"),
        ("int local[4] = {}; local[x[2]] = 1; x[0] = local[x[3]];", "out of bounds"),
        ("x[0] = pick_bytes(1, 2, 0x8000);", "copies of a byte's sign"),
        ("copy_16_async(shared_memory(), x + N - 3, true);", "misaligned source"),
        ("copy_4_async(shared_memory(), x + N, true);", "heap-buffer-overflow"),
        ("copy_16_async(shared_memory() + BYTES - 4, x, true);", "copy_16_async: 16 bytes from byte 44 of 48"),
        ("copy_16_async(shared_memory() + 4, x, true);", "misaligned address, byte 4 of 48"),
        ("copy_4_async(x, x, true);", "copy_4_async: 4 bytes from"),
        ("copy_4_async(shared_memory(), shared_memory() + 4, true);", "source is in shared memory"),
        ("alignas(16) int y[4] = {}; copy_16_async(shared_memory(), y, true);", "source is a local variable"),
        ("u32 r[4]; load_matrices(r, shared_memory() + 8);", "misaligned address, byte 8 of 48"),
        ("u32 r[4]; load_matrices(r, shared_memory() + BYTES);", "16 bytes from byte 48 of 48"),
        ("x[0] = shared_address(x);", "not an address in shared memory"),
        ("if (threadIdx.x) block_barrier();", "but thread"),
        ("if (threadIdx.x < 64) block_barrier(); else warp_barrier();", "block_barrier"),
        ("if (threadIdx.x % 32 < 16) block_barrier(); else warp_barrier();", "warp_barrier"),
        ("if (threadIdx.x != 70) warp_barrier();", "thread 70 .*exit"),
        ("if (threadIdx.x % 2) warp_barrier(); else any_of_warp(true);", "any_of_warp"),
        ("if (threadIdx.x != 5)\nshuffle_xor(0, 1);\nblock_barrier();", "thread 5 .*block_barrier"),
        (MMA + "if (threadIdx.x % 2)\nmma_f16(c, a, b);\nelse\nmma_f16(c, a, b);", "mma_f16"),
    ],
)  # fmt: skip
def test_faults_are_reported(kernel, body, report):
    parameters = "[[maybe_unused]] int* x, [[maybe_unused]] const u8* empty, [[maybe_unused]] const int* nothing"
    run = kernel(parameters, body, N=9, BYTES=48)
    x = np.array([1, 2, 77, 3, 5, 6, 7, 8, 9], np.int32)
    with pytest.raises(SimulationError, match=re.compile(report)) as caught:
        run(x, np.zeros(0, np.uint8), None, threads=128, shared=48)
    assert re.match(r"simulation fault: .*thread \d+ of", str(caught.value))
    assert "kernel.cu:" in str(caught.value) or "(line " in str(caught.value)  # says where


def test_a_fault_names_both_sides(kernel):
    run = kernel("int* x", "if (threadIdx.x == 40 && blockIdx.y == 1) return;\nblock_barrier();\nx[0] = 1;")
    with pytest.raises(SimulationError) as caught:
        run(np.zeros(1, np.int32), grid=(1, 2), threads=64)
    first = str(caught.value).splitlines()[0]
    assert "kernel, thread " in first and "of block (0, 1, 0)" in first
    assert "thread 40" in first and "block_barrier (line 6)" in first


def test_shared_memory_starts_as_garbage(kernel):
    run = kernel("u32* out", "out[threadIdx.x] = reinterpret_cast<u32*>(shared_memory())[threadIdx.x];")
    seen = []
    for seed in range(8):
        out = np.zeros(32, np.uint32)
        run(out, shared=128, seed=seed)
        assert len(set(out.tolist())) > 16
        seen.append(np.isnan(out.view(np.float32)).all())
    assert any(seen) and not all(seen)


def test_endless_kernels_are_stopped(tmp_path, builds):
    source = tmp_path / "kernel.cu"
    source.write_text("#include <primitives.cuh>\nGTA_KERNEL(32) kernel() { for (;;) gta::warp_barrier(); }\n")
    simulator = Simulator(source, ["kernel"], timeout_s=1)
    simulator.compile(builds)
    with pytest.raises(SimulationError, match="still run after 1 s"):
        simulator.run([LaunchSpec("kernel", (1,), 32, 0, [])], 0)


# --- launches ---------------------------------------------------------------------------------------------------------


def test_all_kinds_of_arguments(kernel):
    body = """
        if (threadIdx.x) return;
        out[0] = i; out[1] = l >> 32; out[2] = int(f * 8);
        out[3] = none == nullptr; out[4] = inside[0]; out[5] = u >> 31;"""
    run = kernel("int* out, int i, i64 l, float f, const u8* none, const int* inside, u32 u", body)
    out = np.zeros(6, np.int32)
    data = np.arange(10, dtype=np.int32)
    run(out, -7, np.int64(-(5 << 32)), np.float32(0.375), None, Pointer(data, 12), np.uint32(1 << 31))
    np.testing.assert_array_equal(out, [-7, -5, 3, 1, 3, 1])
    run(out, np.int32(4), np.int64(0), 1.5, None, Pointer(out, 8), 1)
    np.testing.assert_array_equal(out, [4, 0, 12, 1, 12, 0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1,), "takes 2 arguments, not 1"),
        ((1, np.int64(1)), "argument 1"),
        ((1.0, 1.0), "argument 0"),
        ((None, 1.0), "argument 0"),
    ],
)
def test_wrong_arguments_are_refused(kernel, args, message):
    with pytest.raises(SimulationError, match=message):
        kernel("[[maybe_unused]] int i, [[maybe_unused]] float f", "")(*args)


def test_an_int_must_fit(kernel):
    with pytest.raises(TypeError, match="cannot be passed"):
        kernel("[[maybe_unused]] int i", "")(1 << 31)


def test_launches_share_their_buffers_and_kernels_of_a_source_are_told_apart(tmp_path, builds):
    source = tmp_path / "kernel.cu"
    source.write_text(
        "#include <primitives.cuh>\n#include <more.cuh>\n"
        "GTA_KERNEL(64) first(int* x) { x[threadIdx.x] += ADDED; }\n"
        "GTA_KERNEL(64) second(const int* x, int* y) { y[threadIdx.x] = twice(x[threadIdx.x]); }\n"
    )
    (tmp_path / "include").mkdir()
    more = tmp_path / "include" / "more.cuh"
    more.write_text("GTA_DEVICE int twice(int x) { return 2 * x; }\n")
    simulator = Simulator(source, ["first", "second"], {"ADDED": 3}, [more.parent])
    program = simulator.compile(builds)
    assert simulator.compile(tmp_path / "elsewhere") == program
    x, y = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    launches = [LaunchSpec("first", (1,), 64, 0, [x]), LaunchSpec("first", (1,), 64, 0, [x])]
    simulator.run([*launches, LaunchSpec("second", (1,), 64, 0, [x, y])], 0)
    np.testing.assert_array_equal(x, np.arange(64) + 6)
    np.testing.assert_array_equal(y, 2 * x)
    with pytest.raises(SimulationError, match="no kernel third"):
        simulator.run([LaunchSpec("third", (1,), 64, 0, [])], 0)
    with pytest.raises(SimulationError, match="48 threads"):
        simulator.run([LaunchSpec("first", (1,), 48, 0, [x])], 0)
    more.write_text("GTA_DEVICE int twice(int x) { return 3 * x; }\n")
    assert simulator.compile(builds) != program
    assert Simulator(source, ["first"], {"ADDED": 4}, [more.parent]).compile(builds) != program


def test_what_does_not_compile_says_why(kernel):
    with pytest.raises(SimulationError, match="nowhere"):
        kernel("int* x", "x[0] = nowhere;")
    with pytest.raises(SimulationError, match="unused variable"):
        kernel("", "int x = 0;")


def test_read_only_arrays_stay_as_they_are(kernel):
    x = np.zeros(32, np.int32)
    x.flags.writeable = False
    run = kernel("int* x, int value", "x[threadIdx.x] = value;")
    run(x, 0)
    with pytest.raises(SimulationError, match="read-only"):
        run(x, 1)


def test_arrays_that_cannot_be_passed_are_refused(kernel):
    run = kernel("[[maybe_unused]] int* x, [[maybe_unused]] int* y", "")
    x = np.zeros((4, 4), np.int32)
    with pytest.raises(ValueError, match="contiguous"):
        run(x.T, None)
    with pytest.raises(ValueError, match="share memory"):
        run(x, x[1])
