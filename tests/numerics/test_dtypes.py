"""The table of number formats against the libraries whose names it holds."""

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save

from gta_edge.numerics.dtypes import (
    BLOCK_CACHE_TYPES,
    CACHES,
    CHECKPOINT_DTYPES,
    DTYPES,
    PRECISIONS,
    ROW_CACHE_TYPES,
    DType,
    cache_types,
    integer_of,
)

EACH = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@EACH
def test_onnx_knows_it_by_these_names(dtype: DType) -> None:
    assert onnx.TensorProto.DataType.Value(dtype.onnx) == dtype.onnx_number
    assert ir.DataType[dtype.onnx] == dtype.onnx_number
    assert ir.DataType[dtype.onnx].bitwidth == dtype.bits
    assert ir.DataType[dtype.onnx].numpy() == dtype.numpy


@EACH
def test_numpy_and_torch_know_it_by_this_name(dtype: DType) -> None:
    assert dtype.numpy.name == dtype.array
    if dtype.bits % 8:  # torch has none that arrays of numpy become
        with pytest.raises(ValueError, match="4 bits"):
            _ = dtype.bytes
    else:
        assert dtype.numpy.itemsize == dtype.bytes == getattr(torch, dtype.array).itemsize


@EACH
def test_tensorrt_knows_it_by_this_name(dtype: DType) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    assert getattr(tensorrt.DataType, dtype.tensorrt).itemsize * 8 >= dtype.bits


@pytest.mark.parametrize("dtype", CHECKPOINT_DTYPES.values(), ids=CHECKPOINT_DTYPES)
def test_safetensors_writes_it_by_this_name(dtype: DType) -> None:
    file = save({"weight": torch.zeros(4, dtype=getattr(torch, dtype.array))})
    assert f'"dtype":"{dtype.safetensors}"'.encode() in file


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_what_a_cache_may_hold(compute: str) -> None:
    assert cache_types(compute, kernels=True) == (compute, "int8", "fp8", "int4", "int4v2")
    assert cache_types(compute, kernels=False) == (compute,)


def test_integers_by_their_width() -> None:
    assert [integer_of(bits).name for bits in (4, 8)] == ["int4", "int8"]


def test_an_int4_of_a_cache_is_none_of_a_matrix() -> None:
    assert {name: (c.dtype, c.key_bits, c.value_bits, c.scale) for name, c in CACHES.items()} == {
        "fp32": ("fp32", 32, 32, None),
        "fp16": ("fp16", 16, 16, None),
        "bf16": ("bf16", 16, 16, None),
        "int8": ("int8", 8, 8, "fp32"),
        "fp8": ("fp8", 8, 8, "fp32"),
        "int4": ("uint8", 4, 4, "fp16"),
        "int4v2": ("uint8", 4, 2, "fp16"),
    }
    assert (ROW_CACHE_TYPES, BLOCK_CACHE_TYPES) == (("int8", "fp8"), ("int4", "int4v2"))
    assert PRECISIONS == ("fp32", "fp16", "bf16", "int8", "int4")
    assert DTYPES["int4"].array == "int4"
