"""Whether values are finite, for every bit pattern and layout."""

import ml_dtypes
import numpy as np
import pytest

from gta_edge.support.floats import all_finite, first_not_finite

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_every_16_bit_pattern(dtype: type) -> None:
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = np.isfinite(values)
    for i, finite in enumerate(expected):
        assert all_finite(values[i : i + 1]) == finite
        assert finite or first_not_finite(values[i : i + 1]).endswith(" at [0], 1 of 1 values")


@pytest.mark.parametrize(
    "bits", [0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0, 1, 0x80000000]
)
def test_32_bit_patterns_at_the_edges(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    assert all_finite(value) == np.isfinite(value[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 2**17 - 1, 2**17, 299_999])
def test_one_value_anywhere_is_found(dtype: type, value: float, index: int) -> None:
    values = np.ones((300, 1000), dtype)
    assert all_finite(values)
    values.flat[index] = value
    for array in (values, values.T, np.asfortranarray(values), values[None, :, ::-1]):
        assert not all_finite(array)
    row, column = divmod(index, 1000)
    assert first_not_finite(values) == f"{value} at [{row}, {column}], 1 of 300000 values"


def test_a_few_of_many() -> None:
    values = np.zeros((4, 3), np.float32)
    values[1:, 2] = np.nan, np.inf, -np.inf
    assert first_not_finite(values) == "nan at [1, 2], 3 of 12 values"


def test_no_values_are_finite() -> None:
    assert all_finite(np.empty((0, 3), np.float32))
