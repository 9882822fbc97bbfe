"""Stored weights against a checkpoint's: what a format explains passes, and what it does not is found."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.accuracy.storage import compare_float, compare_quantised
from gta_edge.numerics.quantization import QuantizedMatrix, quantize

FORMATS = [(4, 32), (4, 128), (8, None), (8, 32)]
OUT, IN, HEAD = 96, 256, 32


def weights(seed: int, kind: str = "normal", shape: tuple[int, int] = (OUT, IN)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {"normal": rng.standard_normal, "heavy": lambda s: rng.standard_t(3, s)}[kind](shape)
    return (0.02 * values).astype(np.float32)


def rounded_to_text(weight: np.ndarray, bits: int, block: int | None) -> QuantizedMatrix:
    """A matrix rounded as a calibration does, for inputs of which a few directions carry the most."""
    torch = pytest.importorskip("torch")
    from gta_edge.export.gptq import Moments, corrected

    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((600, 40)) @ rng.standard_normal((40, IN)) + 0.3 * rng.standard_normal((600, IN))
    moments = torch.from_numpy((inputs.T @ inputs).astype(np.float32))
    return corrected(torch.from_numpy(weight), Moments(moments), bits, block)


# --- quantised -------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32),
    st.sampled_from(["normal", "heavy"]),
    st.sampled_from(FORMATS),
    st.integers(1, 8).map(lambda n: 16 * n),
    st.sampled_from([128, 256, 384]),
    st.floats(1e-6, 1e3),
)
@settings(max_examples=60, deadline=None)
def test_any_rounded_matrix_passes(
    seed: int, kind: str, how: tuple[int, int | None], rows: int, columns: int, size: float
) -> None:
    weight = weights(seed, kind, (rows, columns)) * np.float32(size)
    weight[::7] = 0  # outputs that were never trained
    weight[:, ::11] *= 0.01
    weight[3] *= 1e-9  # too small for any scale
    assert compare_quantised(quantize(weight, *how), weight) is None


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_a_calibrated_matrix_passes(how: tuple[int, int | None], kind: str) -> None:
    weight = weights(1, kind)
    assert compare_quantised(rounded_to_text(weight, *how), weight) is None


def test_imported_values_that_the_format_holds_exactly_pass() -> None:
    """As of a checkpoint that comes quantised, with scales by the largest weight."""
    codes = np.random.default_rng(0).integers(-8, 8, (OUT, IN)).astype(np.int8)
    stored = QuantizedMatrix(codes, np.full((OUT, IN // 32), 0.01, np.float16), 4, 32)
    assert compare_quantised(stored, stored.values) is None


FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1% too large": lambda w: w * 1.01,
    "1% too small": lambda w: w * 0.99,
    "scale off by 2%": lambda w: w * 1.02,
    "scale off by 5%": lambda w: w * 1.05,
    "times 1.3": lambda w: w * 1.3,
    "two heads swapped": lambda w: np.concatenate([w[HEAD : 2 * HEAD], w[:HEAD], w[2 * HEAD :]]),
    "two rows swapped": lambda w: w[[1, 0, *range(2, OUT)]],
    "one row negated": lambda w: w * np.where(np.arange(OUT) == 5, -1, 1)[:, None],
    "one row lost": lambda w: w * (np.arange(OUT) != 5)[:, None],
    "negated": np.negative,
    "another layer's": lambda w: weights(99),
    "inputs shifted": lambda w: np.roll(w, 1, axis=1),
    "nothing": lambda w: 0 * w + np.float32(1e-7),
}


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_rounding_does_not_explain_is_found(how: tuple[int, int | None], fault: str) -> None:
    weight = weights(2)
    changed = np.ascontiguousarray(FAULTS[fault](weight).astype(np.float32))
    found = compare_quantised(quantize(changed, *how), weight)
    assert found is not None
    assert "as a whole" in found or fault not in ("1% too large", "1% too small", "scale off by 2%")


@pytest.mark.parametrize("fault", ["scale off by 5%", "two heads swapped", "one row negated", "another layer's"])
def test_a_fault_behind_a_calibration_is_found(fault: str) -> None:
    weight = weights(2)
    changed = np.ascontiguousarray(FAULTS[fault](weight).astype(np.float32))
    assert compare_quantised(rounded_to_text(changed, 4, 32), weight) is not None


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.01, 0])
def test_a_scale_that_is_none(value: float) -> None:
    weight = weights(3)
    stored = quantize(weight, 4, 32)
    stored.scales[4, 2] = value
    found = compare_quantised(stored, weight)
    assert found == "has scales that are not positive numbers"


# --- floats ----------------------------------------------------------------------------------------------------------

TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("own", TYPES)
@pytest.mark.parametrize("stored", TYPES)
def test_floats_are_rounded_once(own: str, stored: str) -> None:
    weight = weights(0).astype(TYPES[own])
    assert compare_float(weight.astype(TYPES[stored]).astype(np.float32), weight, TYPES[stored]) is None


@pytest.mark.parametrize("stored", TYPES)
def test_one_bit_is_found(stored: str) -> None:
    weight = weights(0).astype(TYPES[stored])
    other = weight.copy()
    other.reshape(-1).view(f"u{other.itemsize}")[1234] ^= 1
    found = compare_float(other.astype(np.float32), weight, TYPES[stored])
    assert found is not None
    assert f"at [{1234 // IN}, {1234 % IN}]" in found
    assert f"(1 of {OUT * IN} values differ)" in found


def test_what_is_too_small_for_a_type_is_lost() -> None:
    weight = weights(0) * np.float32(1e-7)
    stored = weight.astype(np.float16).astype(np.float32)
    found = compare_float(stored, weight, np.float16)
    assert found is not None and found.startswith("loses ")
    assert compare_float(weight.astype(ml_dtypes.bfloat16).astype(np.float32), weight, ml_dtypes.bfloat16) is None


def test_what_is_not_a_number_is_found() -> None:
    weight = weights(0)
    stored = weight.copy()
    stored[2, 3] = np.nan
    found = compare_float(stored, weight, np.float32)
    assert found is not None and "is nan at [2, 3]" in found
