"""How a checkpoint's tensors lie in a bundle: names, views, types, and the way back.

A graph multiplies ``x [.., in] · W [in, out]``, so a Linear's weight is stored transposed and its name says so;
``v_b_proj`` is stored in the shape that the op takes, which is a view of the same memory. Everything else is stored
as it is. In int8 and int4 a matrix is stored in codes, its scales beside it, and the embedding's codes lie in
words.

Not quantised are vectors (norms, biases), which stay float32: they are 0.1% of the bytes. And the value decoder, which
stays float16 in int8 and int4: it is 0.8% of the weights, it is multiplied head by head, for which no engine has a
kernel on integers, and its error would be added to every value that the attention mixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gta_edge.errors import BundleError, CapacityError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.quantization import BITS, BLOCK_SIZES, DEFAULT_BLOCK_SIZE, unpack_nibbles
from gta_edge.support.choices import unknown
from gta_edge.support.floats import all_finite
from gta_edge.support.text import brief

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "PACKED",
    "PRECISIONS",
    "SCALE",
    "TRANSPOSED",
    "Coded",
    "block_size_for",
    "from_stored",
    "is_kept",
    "parameter_name",
    "read_stored",
    "read_weights",
    "stored_dtype",
    "to_stored",
]

Array = npt.NDArray[Any]

TRANSPOSED = ".transposed"
"""Suffix of the stored name of a matrix that lies transposed."""

SCALE = ".scale"
"""Suffix of the stored name of a quantised matrix's scales."""

PACKED = ".packed"
"""Suffix of the stored name of an embedding table whose codes lie in words of 32 bits."""

PRECISIONS: dict[str, npt.DTypeLike] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.float16,
    "int4": np.float16,
}
"""By the name that ``--precision`` takes, the storage type of the matrices that are not quantised."""


@dataclass(frozen=True)
class Coded:
    """A matrix as an int8 or int4 bundle holds it.

    Attributes:
        codes: int8 [in, out].
        scales: float16 [in / block, out], or [out] where there is one per output channel.
        bits: width of a code, 4 or 8.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    bits: int

    @property
    def block_size(self) -> int:
        """Inputs that share a scale; 0 where there is one per output channel."""
        return self.codes.shape[0] // len(self.scales) if self.scales.ndim == 2 else 0

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """What is meant, float32 [out, in], as in a checkpoint."""
        inputs, outputs = self.codes.shape
        with np.errstate(all="ignore"):  # of damaged scales, which are as they are
            factors = self.scales.astype(np.float32).reshape(-1, 1, outputs)
            split = self.codes.reshape(len(factors), -1, outputs) * factors
        return np.ascontiguousarray(split.reshape(inputs, outputs).T)


def parameter_name(stored_name: str) -> str:
    """Return the checkpoint's name of what is stored under this one."""
    return stored_name.removesuffix(PACKED).removesuffix(TRANSPOSED)


def is_kept(parameter: str) -> bool:
    """Tell whether this matrix is never quantised: the value decoder."""
    return parameter.endswith(".v_b_proj.weight")


def block_size_for(config: ModelConfig, precision: str, block_size: int | None = None) -> int | None:
    """Return the block size that weights are quantised with, None for whole channels and where nothing is quantised.

    Args:
        config: the model's sizes.
        precision: a key of ``PRECISIONS``.
        block_size: what is asked for; the precision's own by default.

    Raises:
        InputError: the precision is unknown, or does not go with this block size and model.
    """
    if precision not in PRECISIONS:
        raise InputError(unknown("precision is {}; expected one of {}", precision, PRECISIONS))
    if precision not in BITS:
        if block_size is not None:
            raise InputError(f"precision is {precision}, which has no blocks; a block size goes with int8 or int4")
        return None
    if block_size is None and precision == "int8":
        if config.hidden_size % 4:
            raise InputError(f"hidden_size is {config.hidden_size}; int8 needs a multiple of 4: use fp16 or bf16")
        return None
    block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    shapes = config.parameter_shapes()
    matrices = {name: shapes[name][1] for name in shapes if len(shapes[name]) == 2 and not is_kept(name)}
    possible = [size for size in BLOCK_SIZES if not any(inputs % size for inputs in matrices.values())]
    if block_size not in possible:
        unfit = {name: n for name, n in matrices.items() if block_size in BLOCK_SIZES and n % block_size}
        odd = next((f"; {name} has {n} inputs" for name, n in unfit.items()), "")
        choice = f"one of {', '.join(map(str, possible))}" if possible else "none fits; use a wider precision"
        raise InputError(f"block size is {brief(block_size)}; expected {choice}{odd}")
    return block_size


def stored_dtype(rank: int, precision: str) -> np.dtype[Any]:
    """Return the type that a parameter of this rank is stored in, if it is not quantised."""
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
        if not all_finite(converted) and all_finite(array):
            raise OverflowError(
                f"{parameter_name(stored_name)} has values up to {float(np.abs(array.astype(np.float32)).max()):.4g}, "
                + ("beyond float16's 65504; use bf16 or fp32" if dtype == np.float16 else "beyond bfloat16; use fp32")
            )
        array = converted
    return np.ascontiguousarray(array).reshape(tuple(shape))


def from_stored(array: Array, stored_name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Undo ``to_stored``: return float32 in the checkpoint's shape."""
    with np.errstate(all="ignore"):  # of damaged weights, which are as they are
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
    for name, stored in read_stored(model_path, config):
        yield name, stored.values if isinstance(stored, Coded) else stored


def read_stored(model_path: Path, config: ModelConfig) -> Iterator[tuple[str, npt.NDArray[np.float32] | Coded]]:
    """Yield the parameters as ``read_weights`` does, but leave quantised matrices in codes."""
    from gta_edge.graph.io import load_graph  # here and not above: opening a bundle needs only the names

    model = load_graph(model_path, config, "export")
    shapes = config.parameter_shapes()
    for stored_name, value in model.graph.initializers.items():
        if stored_name.endswith(SCALE):
            continue  # read with the codes it belongs to
        shape = shapes.get(parameter_name(stored_name))
        if shape is None and stored_name.startswith("model.layers."):
            raise BundleError(f"{model_path}: holds {stored_name}, unknown to config.json; export the bundle again")
        if shape is None:
            continue  # tables and constants of the graph
        if stored_name.endswith(PACKED) and parameter_name(stored_name) + TRANSPOSED in model.graph.initializers:
            continue  # a tied head's matrix, which comes by itself
        values = _values(value, model_path)
        coded = values.dtype.itemsize == 1 or stored_name.endswith(PACKED)
        if not coded and values.size != math.prod(shape):
            raise BundleError(f"{model_path}: {stored_name} is not of the size in config.json; export the bundle again")
        if coded:
            yield parameter_name(stored_name), _coded(stored_name, values, shape, model.graph.initializers, model_path)
        else:
            yield parameter_name(stored_name), from_stored(values, stored_name, shape)


def _coded(
    stored_name: str, stored: Array, shape: Sequence[int], initializers: Mapping[str, ir.Value], model_path: Path
) -> Coded:
    packed = stored_name.endswith(PACKED)
    scale_name = (parameter_name(stored_name) + TRANSPOSED if packed else stored_name) + SCALE
    if scale_name not in initializers:
        raise BundleError(f"{model_path}: {stored_name} has no scales; export the bundle again")
    scales = _values(initializers[scale_name], model_path)  # [in / block, out] or [out]
    if packed:
        codes, bits = _table_codes(stored, stored_name, shape, model_path)
    else:
        codes, bits = stored.astype(np.int8), 4 if stored.dtype == ml_dtypes.int4 else 8  # [in, out]
    if codes.shape != tuple(shape)[::-1]:
        raise BundleError(f"{model_path}: {stored_name} is not of the size in config.json; export the bundle again")
    blocks = len(scales) if scales.ndim == 2 else 1
    if scales.ndim not in (1, 2) or blocks < 1 or codes.shape[0] % blocks or codes.shape[1] != scales.shape[-1]:
        raise BundleError(f"{model_path}: the scales of {stored_name} are {scales.shape}; export the bundle again")
    return Coded(codes, scales, bits)


def _table_codes(
    words: Array, stored_name: str, shape: Sequence[int], model_path: Path
) -> tuple[npt.NDArray[np.int8], int]:
    """Return codes [H, V] of an embedding table [V, H] that lies in words, and their width in bits."""
    stored_bytes = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    whole = math.prod(shape)
    if words.ndim != 2 or words.shape[0] != shape[0] or stored_bytes.size not in (whole, whole // 2):
        raise BundleError(f"{model_path}: {stored_name} is {words.shape}, for {tuple(shape)}; export the bundle again")
    if stored_bytes.size == whole:
        return np.bitwise_xor(stored_bytes, np.uint8(0x80)).view(np.int8).reshape(tuple(shape)).T, 8
    return unpack_nibbles(np.bitwise_xor(stored_bytes, np.uint8(0x88)), shape).T, 4


def _values(value: ir.Value, model_path: Path) -> Array:
    tensor = value.const_value
    if tensor is None:
        raise BundleError(f"{model_path}: initializer {value.name} has no data; export the bundle again")
    try:
        values: Array = tensor.numpy()
    except MemoryError as error:
        raise CapacityError(f"{model_path}: no memory to read {value.name}; close other programs") from error
    return values
