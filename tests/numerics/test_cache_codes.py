"""How codes of a cache in blocks lie in bytes, in arrays of NumPy and tensors of torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.numerics.cache_codes import (
    BLOCK,
    dequantize_keys,
    dequantize_values,
    levels,
    pack,
    unpack,
)


def spelled_out(codes: np.ndarray, bits: int) -> list[int]:
    """Codes [N] in bytes: of units of 8 words of 16 bits, word w has in its n-th place code 8 n + w of its unit.

    What is left over is a unit of fewer words.
    """
    per_word, result = 16 // bits, []
    while len(codes):
        words = min(8, len(codes) // per_word)
        unit, codes = codes[: words * per_word], codes[words * per_word :]
        for w in range(words):
            word = sum(int(unit[words * n + w]) << (bits * n) for n in range(per_word))
            result += [word & 0xFF, word >> 8]
    return result


@given(bits=st.sampled_from([2, 4]), words=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_codes_lie_in_words_of_units(bits: int, words: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, levels(bits), (3, words * 16 // bits), np.uint8, endpoint=True)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.tolist() == [spelled_out(row, bits) for row in codes]
    assert np.array_equal(unpack(packed, bits), codes)
    tensor = pack(torch.from_numpy(codes), bits, torch.cat)
    assert np.array_equal(tensor.numpy(), packed)
    assert np.array_equal(unpack(tensor, bits, torch.cat).numpy(), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_mean_a_scale_times_them_and_a_minimum(bits: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 16, (2, 3, 3 * BLOCK, 24), np.uint8)
    by_channel = keys.reshape(2, 3, 3, BLOCK, 24).swapaxes(-1, -2)
    scales = rng.uniform(0.5, 1, (2, 3, 3, 2, 24)).astype(np.float32)
    found = dequantize_keys(pack(np.ascontiguousarray(by_channel), 4), scales)
    for row in (0, 31, 32, 95):
        expected = keys[:, :, row] * scales[:, :, row // BLOCK, 0] + scales[:, :, row // BLOCK, 1]
        assert np.array_equal(found[:, :, row], expected)
    values = rng.integers(0, levels(bits), (2, 3, 5, 64), np.uint8, endpoint=True)
    scales = rng.uniform(0.5, 1, (2, 3, 5, 2)).astype(np.float32)
    found = dequantize_values(pack(values, bits), scales, bits)
    assert np.array_equal(found, values * scales[..., :1] + scales[..., 1:])
