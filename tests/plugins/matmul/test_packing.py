"""The packed layout of quantised matrices, against its formula, element by element."""

import resource
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.plugins.matmul import packing
from gta_edge.plugins.matmul.packing import Packed, pack, packed_shapes, unpack

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
KINDS = [(4, 32), (4, 64), (4, 128), (8, 0), (8, 32), (8, 64), (8, 128)]
every_kind = pytest.mark.parametrize(("bits", "block_size"), KINDS)


def matrix(k: int, n: int, bits: int, block_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random codes [K, N] and scales [K / block, N] or [N]."""
    rng = np.random.default_rng(seed)
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    codes = rng.integers(low, high, (k, n), np.int8, endpoint=True)
    return codes, rng.uniform(0.1, 2, (k // block_size, n) if block_size else (n,)).astype(np.float16)


def element(codes: np.ndarray, n: int, k: int) -> int:
    return int(codes[k, n]) if k < codes.shape[0] and n < codes.shape[1] else 0


def by_formula(codes: np.ndarray, scales: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight and scale as the formula has them, one element at a time."""
    k, n = codes.shape
    tiles, spans = (n + 15) // 16, (k + 127) // 128
    width = 64 if bits == 4 else 32
    words = np.zeros((tiles, spans * 128 // width, 32, 4), np.uint32)
    for tile_n, tile_k, lane, w in np.ndindex(words.shape):
        g, t = lane // 4, lane % 4
        word = 0
        if bits == 4:
            for i in range(8):
                odd, k8, h = i // 4, (i // 2) % 2, i % 2
                code = element(codes, 16 * tile_n + 8 * h + g, 64 * tile_k + 16 * w + 8 * k8 + 2 * t + odd)
                word |= (code + 8) << 4 * i
        else:
            s, k8 = w // 2, w % 2
            for i in range(4):
                h, odd = i // 2, i % 2
                code = element(codes, 16 * tile_n + 8 * h + g, 32 * tile_k + 16 * s + 8 * k8 + 2 * t + odd)
                word |= (code + 128) << 8 * i
        words[tile_n, tile_k, lane, w] = word
    if not block_size:
        scale = np.zeros((tiles, 1, 8, 1, 2), np.float16)
        for output in range(n):
            scale[output // 16, 0, output % 8, 0, output // 8 % 2] = scales[output]
        return words.view(np.int32), scale
    scale = np.zeros((tiles, spans, 8, 128 // block_size, 2), np.float16)
    for block, output in np.ndindex(scales.shape):
        first = block * block_size
        place = (output // 16, first // 128, output % 8, first % 128 // block_size, output // 8 % 2)
        scale[place] = scales[block, output]
    return words.view(np.int32), scale


@st.composite
def sizes(draw) -> tuple[int, int, int, int, int]:
    """K, N, bits, block size and a seed."""
    bits, block_size = draw(st.sampled_from(KINDS))
    k = draw(st.integers(1, 300 // (block_size or 1))) * (block_size or 1)
    return k, draw(st.integers(1, 50)), bits, block_size, draw(st.integers(0, 2**16))


@settings(SETTINGS, max_examples=15)
@given(sizes=sizes())
def test_every_element_lies_where_the_formula_says(sizes):
    k, n, bits, block_size, seed = sizes
    codes, scales = matrix(k, n, bits, block_size, seed)
    packed = pack(codes, scales, bits, block_size)
    weight, scale = by_formula(codes, scales, bits, block_size)
    np.testing.assert_array_equal(packed.weight, weight)
    np.testing.assert_array_equal(packed.scale, scale)
    assert (packed.weight.dtype, packed.scale.dtype) == (np.int32, np.float16)
    assert packed_shapes(k, n, bits, block_size) == (weight.shape, scale.shape)


@SETTINGS
@given(sizes=sizes())
def test_unpacking_undoes_packing(sizes):
    k, n, bits, block_size, seed = sizes
    codes, scales = matrix(k, n, bits, block_size, seed)
    found = unpack(pack(codes, scales, bits, block_size), k, n, bits, block_size)
    for array, wanted in zip(found, (codes, scales), strict=True):
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


@every_kind
def test_slices_do_not_show(bits, block_size, monkeypatch):
    codes, scales = matrix(256, 100, bits, block_size)
    whole = pack(codes, scales, bits, block_size)
    monkeypatch.setattr(packing, "_SLICE_BYTES", 5000)  # two or three tiles at a time, the last ones fewer
    cut = pack(codes, scales, bits, block_size)
    np.testing.assert_array_equal(cut.weight, whole.weight)
    for found, wanted in zip(unpack(whole, 256, 100, bits, block_size), (codes, scales), strict=True):
        np.testing.assert_array_equal(found, wanted)


@every_kind
def test_matrices_side_by_side_are_tiles_one_after_the_other(bits, block_size):
    codes, scales = matrix(128, 80, bits, block_size)
    whole = pack(codes, scales, bits, block_size)
    parts = [pack(codes[:, cut], scales[..., cut], bits, block_size) for cut in (slice(0, 48), slice(48, 80))]
    np.testing.assert_array_equal(np.concatenate([part.weight for part in parts]), whole.weight)
    np.testing.assert_array_equal(np.concatenate([part.scale for part in parts]), whole.scale)


@every_kind
def test_codes_that_lie_otherwise_are_packed_alike(bits, block_size):
    """Transposed views and columns of something larger, as files hold them."""
    codes, scales = matrix(128, 40, bits, block_size)
    wanted = pack(codes, scales, bits, block_size)
    for lying in (np.asfortranarray(codes), np.concatenate([codes, codes], axis=1)[:, :40]):
        np.testing.assert_array_equal(pack(lying, scales, bits, block_size).weight, wanted.weight)


def test_a_padded_matrix_is_zero_beyond_its_sizes():
    codes, scales = matrix(160, 20, 4, 32)
    packed = pack(codes, scales, 4, 32)
    whole, factors = unpack(packed, 256, 32, 4, 32)
    assert not whole[160:].any()
    assert not whole[:, 20:].any()
    assert not factors[5:].any()
    assert not factors[:, 20:].any()
    np.testing.assert_array_equal(whole[:160, :20], codes)


@pytest.mark.skipif(sys.platform != "linux", reason="memory in units of Linux")
def test_packing_takes_little_more_than_its_result():
    codes, scales = matrix(1280, 40_000, 4, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = pack(codes, scales, 4, 32)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= packed.weight.nbytes + 2 * packed.scale.nbytes + 16 * 2**20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "5 bits; expected 4 or 8"),
        ({"block_size": 16}, "int4 in blocks of 16; expected one of 32, 64, 128"),
        ({"block_size": 0}, "int4 in blocks of 0"),
        ({"bits": 8, "block_size": 16}, "int8 in blocks of 16; expected one of 0, 32, 64, 128"),
        ({"codes": np.zeros((96, 20), np.int16)}, r"codes are int16 \[96, 20\]; expected int8"),
        ({"codes": np.zeros(96, np.int8)}, r"codes are int8 \[96\]; expected int8 \[K, N\]"),
        ({"codes": np.zeros((0, 20), np.int8)}, r"\[0, 20\]; expected at least one input"),
        ({"codes": np.zeros((80, 20), np.int8)}, "80 inputs are no multiple of the block size 32"),
        ({"codes": np.full((96, 20), 8, np.int8)}, "weights from 8 to 8; expected -8 to 7"),
        ({"codes": np.full((96, 20), -9, np.int8)}, "weights from -9 to -9; expected -8 to 7"),
        ({"codes": np.zeros((64, 20), np.int8)}, r"scales are float16 \[3, 20\]; expected float16 \[2, 20\]"),
        ({"scales": np.zeros((3, 20), np.float32)}, r"scales are float32 \[3, 20\]"),
        ({"scales": np.zeros(20, np.float16)}, r"scales are float16 \[20\]; expected float16 \[3, 20\]"),
        ({"scales": np.zeros((20, 3), np.float16)}, r"scales are float16 \[20, 3\]"),
        ({"bits": 8, "block_size": 0}, r"scales are float16 \[3, 20\]; expected float16 \[20\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    codes, scales = matrix(96, 20, 4, 32)
    with pytest.raises(ValueError, match=message):
        pack(**{"codes": codes, "scales": scales, "bits": 4, "block_size": 32} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"the packed weight is int32 \[2, 2, 32, 4\]; expected int32 \[2, 4, 32, 4\]"),
        ({"out_features": 33}, r"the packed weight is .* expected int32 \[3, 2, 32, 4\]"),
        ({"in_features": 160}, r"the packed weight is .* expected int32 \[2, 4, 32, 4\]"),
        ({"in_features": 80}, "80 inputs are no multiple of the block size 32"),
        ({"block_size": 64}, r"the packed scale is float16 \[2, 1, 8, 4, 2\]; expected float16 \[2, 1, 8, 2, 2\]"),
        ({"block_size": 7}, "blocks of 7"),
        ({"dtype": np.float32}, "the packed scale is float32"),
    ],
)
def test_packed_arrays_that_do_not_fit_are_refused(changes, message):
    packed = pack(*matrix(96, 20, 4, 32), 4, 32)
    packed = Packed(packed.weight, packed.scale.astype(changes.pop("dtype", np.float16)))
    arguments = {"in_features": 96, "out_features": 20, "bits": 4, "block_size": 32} | changes
    with pytest.raises(ValueError, match=message):
        unpack(packed, **arguments)
