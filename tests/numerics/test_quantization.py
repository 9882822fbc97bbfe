"""Codes and scales against a search over every scale in float64, and nibbles against ONNX's own."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gta_edge.numerics.quantization import BITS, BLOCK_SIZES, QuantizedMatrix, pack_nibbles, quantize, unpack_nibbles

RANGES = {8: (-127, 127), 4: (-8, 7)}
SMALLEST_NORMAL = 2.0**-14  # of float16; scales below it have fewer digits
DISTRIBUTIONS = {
    "normal": lambda rng, shape: 0.02 * rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "one-sided": lambda rng, shape: 0.1 * rng.exponential(size=shape),
}


def blocks_of(weight: np.ndarray, size: int) -> np.ndarray:
    return weight.astype(np.float64).reshape(-1, size)


def meant(quantized: QuantizedMatrix, size: int) -> np.ndarray:
    """What codes and scales stand for, [blocks, size] in float64."""
    return quantized.codes.astype(np.float64).reshape(-1, size) * quantized.scales.astype(np.float64).reshape(-1, 1)


def error(weight: np.ndarray, quantized: QuantizedMatrix, size: int) -> np.ndarray:
    """The squared error of each block."""
    return ((blocks_of(weight, size) - meant(quantized, size)) ** 2).sum(1)


def least_errors(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The least squared error that any scale allows each block: codes of a thousand scales, each then fitted."""
    lowest, highest = RANGES[bits]
    widest = np.abs(blocks).max(1, keepdims=True)
    least = (blocks**2).sum(1)
    for fraction in np.linspace(0.4, 1.3, 1000):
        codes = np.clip(np.rint(blocks * highest / (fraction * widest)), lowest, highest)
        fitted = (blocks * codes).sum(1) / (codes * codes).sum(1)
        least = np.minimum(least, ((blocks - fitted[:, None] * codes) ** 2).sum(1))
    return least


def plain_error(block: np.ndarray, bits: int) -> float:
    """The squared error of rounding with the scale that the largest magnitude asks for, stored as scales are."""
    lowest, highest = RANGES[bits]
    if not block.any():
        return 0.0
    scale = max(float(np.float16(np.abs(block).max() / highest)), 2.0**-24)
    return float(((block - scale * np.clip(np.rint(block / scale), lowest, highest)) ** 2).sum())


# --- how near the codes come -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("bits", "size", "above"),
    # an int8 code is off by so little that its scale hardly matters: the search for it is a coarse one
    [(4, 16, 0.06), (4, 32, 0.03), (4, 64, 0.02), (4, 128, 0.02), (8, 128, 0.2), (8, 768, 0.08)],
)
def test_little_is_lost_to_the_best_scales(distribution: str, bits: int, size: int, above: float) -> None:
    weight = DISTRIBUTIONS[distribution](np.random.default_rng(size), (4096 // size + 8, size)).astype(np.float32)
    found = error(weight, quantize(weight, bits, size), size).sum()
    least = least_errors(blocks_of(weight, size), bits).sum()
    plain = sum(plain_error(block, bits) for block in blocks_of(weight, size))
    assert 0 < least * (1 - 1e-3) <= found <= least * (1 + above)
    assert found <= plain * (0.95 if bits == 4 else 1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("bits", "above"), [(4, 2e-3), (8, 0.1)])  # what rounding the scale to float16 may cost
def test_no_block_is_worse_than_plain_rounding(distribution: str, bits: int, above: float) -> None:
    rng = np.random.default_rng(0)
    for size in BLOCK_SIZES:
        weight = DISTRIBUTIONS[distribution](rng, (500, size)).astype(np.float32)
        found = error(weight, quantize(weight, bits, size), size)
        plain = np.array([plain_error(block, bits) for block in blocks_of(weight, size)])
        assert (found / plain).max() <= 1 + above, f"blocks of {size}"


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int, int | None]:
    """A matrix, bits and a block size: blocks of magnitudes far apart, with zeros and single values among them."""
    bits = draw(st.sampled_from([4, 8]))
    size = draw(st.sampled_from([*BLOCK_SIZES, 48]))  # whole channels have any width
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = rng.standard_normal((rows, blocks, size))
    weight *= 10.0 ** rng.integers(draw(st.integers(-9, 4)), 5, (rows, blocks, 1))
    weight *= rng.random((rows, blocks, size)) < draw(st.sampled_from([0.0, 1 / size, 0.5, 1.0]))
    whole = blocks == 1 and draw(st.booleans())
    return weight.reshape(rows, -1).astype(np.float32), bits, None if whole else size


@settings(max_examples=150, deadline=None)
@given(matrices())
@example((np.zeros((1, 16), np.float32), 4, 16))
def test_whatever_the_matrix(case: tuple[np.ndarray, int, int | None]) -> None:
    weight, bits, block_size = case
    kept = weight.copy()
    quantized = quantize(weight, bits, block_size)
    np.testing.assert_array_equal(weight, kept)

    rows, columns = weight.shape
    size = block_size or columns
    lowest, highest = RANGES[bits]
    assert (quantized.codes.dtype, quantized.codes.shape) == (np.int8, (rows, columns))
    assert (quantized.scales.dtype, quantized.scales.shape) == (np.float16, (rows, columns // size))
    assert lowest <= quantized.codes.min() <= quantized.codes.max() <= highest
    assert np.isfinite(quantized.scales).all()
    assert (quantized.scales > 0).all()
    assert quantized.values.dtype == np.float32
    np.testing.assert_array_equal(quantized.values, meant(quantized, size).reshape(rows, columns))  # exact in float32

    # each code is the nearest: off by half a step at most, unless it is the last one
    scales = quantized.scales.astype(np.float64).reshape(-1, 1)
    away = np.abs(blocks_of(weight, size) - meant(quantized, size))
    last = np.isin(quantized.codes.reshape(-1, size), (lowest, highest))
    assert (away[~last] <= (scales / 2 * (1 + 1e-6)).repeat(size, 1)[~last]).all()
    assert (quantized.codes[weight == 0] == 0).all()

    found = error(weight, quantized, size)
    assert (found <= (blocks_of(weight, size) ** 2).sum(1)).all()  # storing zeros would be no better
    normal = quantized.scales.reshape(-1) >= SMALLEST_NORMAL
    plain = np.array([plain_error(block, bits) for block in blocks_of(weight, size)])
    assert (found <= plain * 1.15 + 1e-6 * (blocks_of(weight, size) ** 2).sum(1))[normal].all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES), st.integers(0, 2**32))
def test_what_is_in_codes_already_stays(bits: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lowest, highest = RANGES[bits]
    codes = rng.integers(lowest, highest + 1, (6, 2 * size)).astype(np.int8)
    codes[:, ::size] = highest  # a block that uses its range, as quantised ones do
    scales = (10.0 ** rng.uniform(-4, 4, (6, 2))).astype(np.float16)
    scales[scales < SMALLEST_NORMAL] = SMALLEST_NORMAL
    exact = QuantizedMatrix(codes, scales, bits, size)
    again = quantize(exact.values, bits, size)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.scales, scales)


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("block_size", [None, 16, 48])
def test_the_form_that_a_bundle_stores(bits: int, block_size: int | None) -> None:
    """It is what ONNX's DequantizeLinear takes along axis 0, or per channel along axis 1."""
    weight = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    matrix = quantize(weight, bits, block_size)
    repeated = np.repeat(np.atleast_2d(matrix.stored_scales.astype(np.float32)), block_size or 48, axis=0)
    assert matrix.stored_scales.shape == ((48 // block_size, 5) if block_size else (5,))
    np.testing.assert_array_equal((matrix.stored_codes * repeated).T, matrix.values)
    assert matrix.block_size == (block_size or 0)


# --- blocks at the edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("size", [16, 128])
def test_a_block_of_zeros_means_zeros(bits: int, size: int) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 2 * size)).astype(np.float32)
    weight[1, size:] = 0
    quantized = quantize(weight, bits, size)
    assert not quantized.codes[1, size:].any()
    assert (quantized.scales > 0).all()
    assert not quantized.values[1, size:].any()
    assert quantized.codes[1, :size].any()


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.01, -0.03, 5e4, -6e4])
def test_one_value_among_zeros(bits: int, value: float) -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, 19] = value
    quantized = quantize(weight, bits, 32)
    assert np.flatnonzero(quantized.codes).tolist() == [19]
    assert quantized.values[0, 19] == pytest.approx(value, rel=2.0**-10)


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-20, 1e-9, 3e-8, 1e-7, 1e-6])
def test_values_too_small_for_a_scale_become_next_to_nothing(bits: int, largest: float) -> None:
    weight = (np.linspace(-1, 1, 64)[None] * largest).astype(np.float32)
    quantized = quantize(weight, bits, 32)
    assert (quantized.scales > 0).all()
    assert np.isfinite(quantized.values).all()
    assert np.abs(quantized.values - weight).max() <= max(2.0**-25, 0.2 * largest)


@pytest.mark.parametrize("bits", RANGES)
def test_values_up_to_the_largest_scale(bits: int) -> None:
    highest = RANGES[bits][1]
    weight = np.linspace(-1, 1, 32, dtype=np.float32)[None] * np.float32(65504 * highest)
    quantized = quantize(weight, bits, 32)
    assert np.isfinite(quantized.scales).all()
    assert np.abs(quantized.values - weight).max() <= 65504 * (0.51 if bits == 8 else 1.0)


BAD = {
    "not a number": np.nan,
    "infinite": np.inf,
    "minus infinity": -np.inf,
    "beyond the largest scale": 1e8,
    "squares overflow": 3e38,
}


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("block_size", [16, None])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_what_no_scale_reaches_is_refused(bits: int, block_size: int | None, value: float) -> None:
    weight = np.random.default_rng(0).standard_normal((900, 128)).astype(np.float32)
    weight[700, 40] = value  # one of many, in none of the first chunks
    with pytest.raises(OverflowError, match="not finite, or too large for a float16 scale"):
        quantize(weight, bits, block_size)


# --- what does not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("columns", [16, 80, 128])
def test_a_channel_is_one_block(bits: int, columns: int) -> None:
    weight = np.random.default_rng(1).standard_normal((7, columns)).astype(np.float32)
    channel, block = quantize(weight, bits), quantize(weight, bits, columns)
    assert channel.scales.shape == (7, 1)
    np.testing.assert_array_equal(channel.codes, block.codes)
    np.testing.assert_array_equal(channel.scales, block.scales)


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (8, None), (8, 128)])
@pytest.mark.parametrize("shape", [(600, 128), (165, 1024), (3, 2**17)], ids=str)
def test_rows_do_not_depend_on_each_other(bits: int, block_size: int | None, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    together = quantize(weight, bits, block_size)
    for row in (0, 1, len(weight) // 2, len(weight) - 1):
        alone = quantize(weight[row : row + 1], bits, block_size)
        np.testing.assert_array_equal(alone.codes[0], together.codes[row])
        np.testing.assert_array_equal(alone.scales[0], together.scales[row])
    backwards = quantize(np.ascontiguousarray(weight[::-1]), bits, block_size)
    np.testing.assert_array_equal(backwards.codes[::-1], together.codes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_type_of_the_weight_does_not_matter(dtype: type) -> None:
    weight = np.random.default_rng(3).standard_normal((9, 64)).astype(np.float16).astype(ml_dtypes.bfloat16)
    expected, found = quantize(weight.astype(np.float32), 4, 16), quantize(weight.astype(dtype), 4, 16)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(-6, 6), st.integers(0, 2**32))
def test_a_power_of_two_moves_the_scales_alone(bits: int, power: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)
    one, other = quantize(weight, bits, 32), quantize(weight * np.float32(2.0**power), bits, 32)
    np.testing.assert_array_equal(other.codes, one.codes)
    np.testing.assert_array_equal(other.scales.astype(np.float64), one.scales.astype(np.float64) * 2.0**power)


def test_int8_is_symmetric() -> None:
    weight = np.random.default_rng(4).standard_normal((8, 96)).astype(np.float32)
    np.testing.assert_array_equal(quantize(-weight, 8).codes, -quantize(weight, 8).codes)


def test_int4_uses_the_lowest_code() -> None:
    weight = np.random.default_rng(5).standard_normal((64, 64)).astype(np.float32)
    assert set(quantize(weight, 4, 32).codes.reshape(-1).tolist()) == set(range(-8, 8))


def test_the_precisions_have_the_bits_of_their_names() -> None:
    assert dict(BITS) == {"int8": 8, "int4": 4}


# --- nibbles ---------------------------------------------------------------------------------------------------------

nibbles = st.lists(st.integers(-8, 7), min_size=1, max_size=70).map(lambda codes: np.array(codes, np.int8))


@settings(deadline=None)
@given(nibbles)
@example(np.arange(-8, 8, dtype=np.int8))
def test_nibbles_are_packed_as_onnx_packs_them(codes: np.ndarray) -> None:
    packed = pack_nibbles(codes)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4)).raw_data
    np.testing.assert_array_equal(ir.PackedTensor(packed, ir.DataType.INT4, shape=codes.shape).numpy(), codes)
    proto = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, codes.shape, packed.tobytes(), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto).astype(np.int8), codes)


@settings(deadline=None)
@given(nibbles)
def test_nibbles_come_back(codes: np.ndarray) -> None:
    found = unpack_nibbles(pack_nibbles(codes), codes.shape)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 6), (2, 3, 5)])
def test_nibbles_of_any_shape(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(6).integers(-8, 8, shape).astype(np.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (-(-codes.size // 2),)
    np.testing.assert_array_equal(packed, pack_nibbles(codes.reshape(-1)))
    np.testing.assert_array_equal(unpack_nibbles(packed, shape), codes)


def test_unsigned_nibbles_pack_alike() -> None:
    codes = np.arange(16, dtype=np.uint8)
    assert pack_nibbles(codes).tobytes() == onnx.numpy_helper.from_array(codes.astype(ml_dtypes.uint4)).raw_data
