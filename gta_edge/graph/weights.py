"""The weights of a bundle, read back from its graph in the checkpoint's names and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gta_edge.errors import BundleError, CapacityError
from gta_edge.formats.weights import PACKED, SCALE, TRANSPOSED, from_stored, parameter_name
from gta_edge.graph.io import load_graph
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.quantization import QuantizedMatrix, unpack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["read_stored", "read_weights"]

Array = npt.NDArray[Any]


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
    for name, stored in read_stored(model_path, config):
        yield name, stored.values if isinstance(stored, QuantizedMatrix) else stored


def read_stored(
    model_path: Path, config: ModelConfig
) -> Iterator[tuple[str, npt.NDArray[np.float32] | QuantizedMatrix]]:
    """Yield the parameters as ``read_weights`` does, but leave quantised matrices in codes."""
    model = load_graph(model_path, config, "export")
    shapes = config.parameter_shapes()
    for stored_name, value in model.graph.initializers.items():
        if stored_name.endswith(SCALE):
            continue  # read with the codes it belongs to
        shape = shapes.get(parameter_name(stored_name))
        if shape is None and stored_name.startswith("model.layers."):
            raise BundleError(f"{model_path}: holds {stored_name}, unknown to config.json", "export the bundle again")
        if shape is None:
            continue  # tables and constants of the graph
        if stored_name.endswith(PACKED) and parameter_name(stored_name) + TRANSPOSED in model.graph.initializers:
            continue  # a tied head's matrix, which comes by itself
        values = _values(value, model_path)
        coded = values.dtype.itemsize == 1 or stored_name.endswith(PACKED)
        if not coded and values.size != math.prod(shape):
            raise BundleError(
                f"{model_path}: {stored_name} is not of the size in config.json", "export the bundle again"
            )
        if coded:
            yield parameter_name(stored_name), _coded(stored_name, values, shape, model.graph.initializers, model_path)
        else:
            yield parameter_name(stored_name), from_stored(values, stored_name, shape)


def _coded(
    stored_name: str, stored: Array, shape: Sequence[int], initializers: Mapping[str, ir.Value], model_path: Path
) -> QuantizedMatrix:
    packed = stored_name.endswith(PACKED)
    scale_name = (parameter_name(stored_name) + TRANSPOSED if packed else stored_name) + SCALE
    if scale_name not in initializers:
        raise BundleError(f"{model_path}: {stored_name} has no scales", "export the bundle again")
    scales = _values(initializers[scale_name], model_path)  # [in / block, out] or [out]
    if packed:
        codes, bits = _table_codes(stored, stored_name, shape, model_path)
    else:
        codes, bits = stored.astype(np.int8), 4 if stored.dtype == ml_dtypes.int4 else 8  # [in, out]
    if codes.shape != tuple(shape)[::-1]:
        raise BundleError(f"{model_path}: {stored_name} is not of the size in config.json", "export the bundle again")
    blocks = len(scales) if scales.ndim == 2 else 1
    if scales.ndim not in (1, 2) or blocks < 1 or codes.shape[0] % blocks or codes.shape[1] != scales.shape[-1]:
        raise BundleError(f"{model_path}: the scales of {stored_name} are {scales.shape}", "export the bundle again")
    block_size = codes.shape[0] // blocks if scales.ndim == 2 else 0
    return QuantizedMatrix(codes.T, scales.reshape(blocks, -1).T, bits, block_size)


def _table_codes(
    words: Array, stored_name: str, shape: Sequence[int], model_path: Path
) -> tuple[npt.NDArray[np.int8], int]:
    """Return codes [H, V] of an embedding table [V, H] that lies in words, and their width in bits."""
    stored_bytes = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    whole = math.prod(shape)
    if words.ndim != 2 or words.shape[0] != shape[0] or stored_bytes.size not in (whole, whole // 2):
        raise BundleError(
            f"{model_path}: {stored_name} is {words.shape}, for {tuple(shape)}", "export the bundle again"
        )
    if stored_bytes.size == whole:
        return np.bitwise_xor(stored_bytes, np.uint8(0x80)).view(np.int8).reshape(tuple(shape)).T, 8
    return unpack_nibbles(np.bitwise_xor(stored_bytes, np.uint8(0x88)), shape).T, 4


def _values(value: ir.Value, model_path: Path) -> Array:
    tensor = value.const_value
    if tensor is None:
        raise BundleError(f"{model_path}: initializer {value.name} has no data", "export the bundle again")
    try:
        values: Array = tensor.numpy()
    except MemoryError as error:
        raise CapacityError(f"{model_path}: no memory to read {value.name}", "close other programs") from error
    return values
