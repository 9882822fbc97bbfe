"""How a checkpoint's tensors lie in a bundle: names, views, types, and the way back.

A graph multiplies ``x [.., in] · W [in, out]``, so a Linear's weight is stored transposed and its name says so;
``v_b_proj`` is stored in the shape that the op takes, which is a view of the same memory. Everything else is stored
as it is. Vectors (norms, biases) stay float32 in every precision: they are 0.1% of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gta_edge.config import ModelConfig
from gta_edge.errors import BundleError, GtaEdgeError
from gta_edge.files import plain_name
from gta_edge.optional import optional

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PRECISIONS", "TRANSPOSED", "from_stored", "parameter_name", "read_weights", "stored_dtype", "to_stored"]

Array = npt.NDArray[Any]

TRANSPOSED = ".transposed"
"""Suffix of the stored name of a matrix that lies transposed."""

PRECISIONS: dict[str, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
"""Storage types of the matrices by the name that ``--precision`` takes."""


def parameter_name(stored_name: str) -> str:
    """Return the checkpoint's name of what is stored under this one."""
    return stored_name.removesuffix(TRANSPOSED)


def stored_dtype(rank: int, precision: str) -> np.dtype[Any]:
    """Return the type that a parameter of this rank is stored in."""
    return np.dtype(PRECISIONS[precision] if rank > 1 else np.float32)


def to_stored(array: Array, stored_name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
    """Return a checkpoint's tensor in its stored view and type, contiguous.

    Raises:
        OverflowError: a finite value is too large for the type.
    """
    if stored_name.endswith(TRANSPOSED):
        array = array.T
    if array.dtype != dtype:
        with np.errstate(over="ignore"):
            converted = array.astype(dtype)
        if np.dtype(dtype) == np.float16 and not np.isfinite(converted).all() and np.isfinite(array).all():
            raise OverflowError(
                f"{parameter_name(stored_name)} has values up to {float(np.abs(array.astype(np.float32)).max()):.4g}, "
                "beyond float16's 65504; use bf16 or fp32"
            )
        array = converted
    return np.ascontiguousarray(array).reshape(tuple(shape))


def from_stored(array: Array, stored_name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Undo ``to_stored``: return float32 in the checkpoint's shape."""
    values = array.astype(np.float32)
    if stored_name.endswith(TRANSPOSED):
        values = values.T
    return np.ascontiguousarray(values).reshape(tuple(shape))


def read_weights(model_path: Path, config: ModelConfig) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the parameters that a bundle's graph holds, dequantised, one at a time.

    Args:
        model_path: the bundle's ONNX file.
        config: the bundle's config, for names and shapes.

    Yields:
        checkpoint name, and float32 values in the checkpoint's shape.

    Raises:
        BundleError: the file cannot be read, or an initializer does not fit the config.
    """
    onnx_ir = optional("onnx_ir", "export")  # here and not above: opening a bundle needs only the names
    try:
        model = onnx_ir.load(model_path)
    except GtaEdgeError:
        raise
    except Exception as error:  # the parser's errors have no common base
        raise BundleError(f"{model_path}: is not a readable ONNX model ({error}); export the bundle again") from error
    shapes = config.parameter_shapes()
    for stored_name, value in model.graph.initializers.items():
        shape = shapes.get(parameter_name(stored_name))
        if shape is None and stored_name.startswith("model.layers."):
            raise BundleError(f"{model_path}: holds {stored_name}, unknown to config.json; export the bundle again")
        if shape is None:
            continue  # tables and constants of the graph
        values = _values(value, model_path)
        if values.size != math.prod(shape):
            raise BundleError(f"{model_path}: {stored_name} is not of the size in config.json; export the bundle again")
        yield parameter_name(stored_name), from_stored(values, stored_name, shape)


def _values(value: ir.Value, model_path: Path) -> Array:
    external = optional("onnx_ir", "export").ExternalTensor
    tensor = value.const_value
    if tensor is None:
        raise BundleError(f"{model_path}: initializer {value.name} has no data; export the bundle again")
    if isinstance(tensor, external) and not plain_name(str(tensor.location)):
        raise BundleError(f"{model_path}: {value.name} lies outside the bundle, in {tensor.location}; export it again")
    try:
        values: Array = tensor.numpy()
    except (OSError, ValueError) as error:
        raise BundleError(f"{model_path}: {value.name} cannot be read ({error}); export the bundle again") from error
    if isinstance(tensor, external):
        values = values.copy()
        tensor.release()  # mapped pages count as memory in use
    return values
