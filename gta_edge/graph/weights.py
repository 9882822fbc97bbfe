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
from gta_edge.formats.weights import COLUMNS, PACKED, SCALE, TRANSPOSED, from_stored, parameter_name
from gta_edge.graph.io import load_graph
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.quantization import QuantizedMatrix, unpack_nibbles

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["StoredWeights", "read_stored", "read_weights"]

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
    weights = StoredWeights(model_path, config)
    for name in weights.names:
        yield name, weights.read(name)


class StoredWeights:
    """The parameters that a bundle's graph holds, each read when it is asked for.

    Args:
        model_path: the bundle's ONNX file.
        config: the bundle's config, for names and shapes.

    Attributes:
        graph: the bundle's graph.
        names: checkpoint names of the parameters that it holds, in the graph's order.

    Raises:
        BundleError: the file cannot be read, or holds what the config does not know.
    """

    def __init__(self, model_path: Path, config: ModelConfig) -> None:
        self._path, self._shapes = model_path, config.parameter_shapes()
        self.graph = load_graph(model_path, config, "export").graph
        self._places: dict[str, list[str]] = {}  # stored names by parameter
        for stored_name in self.graph.initializers:
            name = parameter_name(stored_name)
            if stored_name.endswith(SCALE):
                continue  # read with the codes it belongs to
            if name in self._shapes:
                self._places.setdefault(name, []).append(stored_name)
            elif stored_name.startswith("model.layers."):
                raise BundleError(
                    f"{model_path}: holds {stored_name}, unknown to config.json", "export the bundle again"
                )
        self.names = tuple(self._places)

    def places(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that hold a parameter, the one that is multiplied by first.

        An embedding that is the head's matrix too may lie in two of them, each in a layout of its own.
        """
        return tuple(sorted(self._places[name], key=lambda stored_name: stored_name.endswith((PACKED, COLUMNS))))

    def read(self, name: str, place: str | None = None) -> npt.NDArray[np.float32] | QuantizedMatrix:
        """Return a parameter in the checkpoint's shape.

        Args:
            name: of the parameter.
            place: one of its ``places``; the first by default.

        Raises:
            BundleError: it does not fit the config, or cannot be read.
            CapacityError: there is no memory for it.
        """
        stored_name = place or self.places(name)[0]
        shape = self._shapes[name]
        values = _values(self.graph.initializers[stored_name], self._path)
        if values.dtype.itemsize == 1 or stored_name.endswith(PACKED):
            return _coded(stored_name, values, shape, self.graph.initializers, self._path)
        if values.size != math.prod(shape):
            raise BundleError(
                f"{self._path}: {stored_name} is not of the size in config.json", "export the bundle again"
            )
        return from_stored(values, stored_name, shape)

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """Return a parameter dequantised, float32; otherwise as ``read``."""
        stored = self.read(name)
        return stored.values if isinstance(stored, QuantizedMatrix) else stored

    def dtype(self, place: str) -> np.dtype[Any]:
        """Return the type in which a tensor's values are stored."""
        tensor = self.graph.initializers[place].const_value
        assert tensor is not None  # ``load_graph`` has seen to it
        dtype: np.dtype[Any] = tensor.dtype.numpy()
        return dtype

    def block_size(self, name: str) -> int | None:
        """Return how many inputs of a matrix share a scale: 0 for all of them, None where it is not quantised."""
        place = self.places(name)[0]
        scales = self.graph.initializers.get(parameter_name(place) + TRANSPOSED + SCALE)
        if scales is None or scales.shape is None or name not in self._shapes:
            return None
        shape = scales.shape.numpy()
        return self._shapes[name][1] // shape[0] if len(shape) == 2 else 0

    def table(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a tensor that is no parameter, None where the graph has none of this name."""
        value = self.graph.initializers.get(name)
        return None if value is None else np.asarray(_values(value, self._path), np.float32)


def _coded(
    stored_name: str, stored: Array, shape: Sequence[int], initializers: Mapping[str, ir.Value], model_path: Path
) -> QuantizedMatrix:
    packed = stored_name.endswith(PACKED)
    scale_name = parameter_name(stored_name) + TRANSPOSED + SCALE
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
