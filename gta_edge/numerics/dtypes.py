"""The one table of number formats: widths, and what each library calls them.

Weights are stored and activations computed in these types. Other modules look names and sizes up here instead of
spelling them. How a KV cache stores its values is a table of its own, ``CACHES``, since keys and values may differ in
it: ``int4`` of a cache has little to do with ``int4`` of a matrix. Which of all these a backend computes in and caches,
its descriptor says (``gta_edge.runtime.backend``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "BLOCK_CACHE_TYPES",
    "CACHES",
    "CACHE_TYPES",
    "CHECKPOINT_DTYPES",
    "COMPUTE_TYPES",
    "DTYPES",
    "FLOAT_TYPES",
    "LARGEST_CODES",
    "PRECISIONS",
    "QUANTIZED_CACHE_TYPES",
    "ROW_CACHE_TYPES",
    "CacheType",
    "DType",
    "cache_types",
    "integer_of",
]


@dataclass(frozen=True)
class DType:
    """A number format.

    Attributes:
        name: as the options of the command line take it, ``bf16``.
        bits: width of a value.
        array: its name in numpy or ml_dtypes, in torch, and in a model's config.json.
        onnx: its name in ONNX (``onnx.TensorProto``, ``onnx_ir.DataType``).
        onnx_number: ONNX's number for it.
        tensorrt: its name in TensorRT (``tensorrt.DataType``).
        safetensors: its name in a safetensors file; None where weights in it are not read.
        needs_scale: whether a value means something only with a scale, which is stored beside it.
    """

    name: str
    bits: int
    array: str
    onnx: str
    onnx_number: int
    tensorrt: str
    safetensors: str | None = None
    needs_scale: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of a value.

        Raises:
            ValueError: it takes less than one, and only ``bits`` says how much.
        """
        if self.bits % 8:
            raise ValueError(f"a value of {self.name} has {self.bits} bits, which are no whole bytes")
        return self.bits // 8

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype of arrays of it; numpy and ml_dtypes are loaded when it is asked for."""
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.array, self.array))


_TABLE = (
    DType("fp32", 32, "float32", "FLOAT", 1, "FLOAT", "F32"),
    DType("fp16", 16, "float16", "FLOAT16", 10, "HALF", "F16"),
    DType("bf16", 16, "bfloat16", "BFLOAT16", 16, "BF16", "BF16"),
    DType("int8", 8, "int8", "INT8", 3, "INT8", needs_scale=True),
    DType("fp8", 8, "float8_e4m3fn", "FLOAT8E4M3FN", 17, "FP8", needs_scale=True),
    DType("int4", 4, "int4", "INT4", 22, "INT4", needs_scale=True),
    DType("uint8", 8, "uint8", "UINT8", 2, "INT8", needs_scale=True),  # codes of a cache, several in a byte
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}
"""By name."""

FLOAT_TYPES = tuple(dtype.name for dtype in _TABLE if not dtype.needs_scale)
"""Types that backends may compute in."""

COMPUTE_TYPES = tuple(name for name in FLOAT_TYPES if DTYPES[name].bits == 16)
"""Types that the CUDA kernels of this package compute in."""

PRECISIONS = tuple(name for name in DTYPES if name not in ("fp8", "uint8"))
"""Types that a bundle's weights may be stored in; what ``--precision`` takes."""


@dataclass(frozen=True)
class CacheType:
    """How a KV cache stores its values; what it consists of then, ``gta_edge.model.kv_cache`` says.

    Attributes:
        name: as ``--cache-dtype`` takes it.
        dtype: type of the arrays that hold keys and values, one of ``DTYPES``.
        key_bits: width of a key's value, or of its code.
        value_bits: the same of a value, or of what takes its place.
        scale: type of the scales beside them, one of ``DTYPES``; None without any.
        in_blocks: whether tokens are quantised in blocks (``gta_edge.numerics.cache_codes``), and not each by itself.
    """

    name: str
    dtype: str
    key_bits: int
    value_bits: int
    scale: str | None = None
    in_blocks: bool = False


CACHES = {
    **{name: CacheType(name, name, DTYPES[name].bits, DTYPES[name].bits) for name in FLOAT_TYPES},
    **{name: CacheType(name, name, 8, 8, scale="fp32") for name in ("int8", "fp8")},
    "int4": CacheType("int4", "uint8", 4, 4, scale="fp16", in_blocks=True),
    "int4v2": CacheType("int4v2", "uint8", 4, 2, scale="fp16", in_blocks=True),
}
"""Ways to store a KV cache, by name."""

ROW_CACHE_TYPES = tuple(name for name, cache in CACHES.items() if cache.scale and not cache.in_blocks)
"""Types of a cache of 8 bits, which has a float32 scale per head and token beside it."""

LARGEST_CODES = {"int8": 127.0, "fp8": 448.0}
"""What the value of largest magnitude of a row becomes in these, but for its sign."""

BLOCK_CACHE_TYPES = tuple(name for name, cache in CACHES.items() if cache.in_blocks)
"""Types of a cache of 4 bits, or of 4 and 2, whose tokens are quantised in blocks."""

QUANTIZED_CACHE_TYPES = (*ROW_CACHE_TYPES, *BLOCK_CACHE_TYPES)
"""All of these."""

CACHE_TYPES = (*COMPUTE_TYPES, *QUANTIZED_CACHE_TYPES)
"""Types of the caches that the attention kernels of this package read and write."""

CHECKPOINT_DTYPES = {DTYPES[name].array: DTYPES[name] for name in FLOAT_TYPES}
"""Types that a checkpoint may be stored in, by the name in config.json."""


def cache_types(compute: str, *, kernels: bool) -> tuple[str, ...]:
    """Return the types that a cache may have beside activations in ``compute``, the default first.

    Args:
        compute: type of activations.
        kernels: whether the attention kernels of this package keep the cache: they alone quantise it.
    """
    return (compute, *QUANTIZED_CACHE_TYPES) if kernels else (compute,)


def integer_of(bits: int) -> DType:
    """Return the type of weights that are quantised to so many bits, 4 or 8."""
    return DTYPES[f"int{bits}"]
