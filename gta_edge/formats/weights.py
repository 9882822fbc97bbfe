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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import DTYPES, PRECISIONS
from gta_edge.numerics.quantization import BITS, BLOCK_SIZES, DEFAULT_BLOCK_SIZE
from gta_edge.support.choices import unknown
from gta_edge.support.floats import all_finite
from gta_edge.support.text import brief

__all__ = [
    "COLUMNS",
    "EMBEDDING",
    "HEAD",
    "PACKED",
    "SCALE",
    "TRANSPOSED",
    "Storage",
    "block_size_for",
    "from_stored",
    "is_kept",
    "parameter_name",
    "storage_for",
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


COLUMNS = ".columns"
"""Suffix of a second name of the same bytes: a tied int8 table's transposed matrix, where its rows are looked up.

ONNX Runtime fuses a quantised matrix with its product only where nothing else reads it under that name.
"""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Storage:
    """How the matrices of a bundle are stored.

    Attributes:
        precision: one of ``PRECISIONS``.
        block_size: weights that share a scale; None for whole output channels, and where nothing is quantised.
        int8: parameters of an int4 bundle that are stored in int8, with one scale per output channel.
    """

    precision: str
    block_size: int | None = None
    int8: frozenset[str] = frozenset()

    def of(self, parameter: str) -> tuple[str, int | None]:
        """Return the precision and the block size of one matrix."""
        if self.precision not in BITS:
            return self.precision, None
        if is_kept(parameter):
            return "fp16", None
        return ("int8", None) if parameter in self.int8 else (self.precision, self.block_size)


def parameter_name(stored_name: str) -> str:
    """Return the checkpoint's name of what is stored under this one."""
    return stored_name.removesuffix(PACKED).removesuffix(COLUMNS).removesuffix(TRANSPOSED)


def is_kept(parameter: str) -> bool:
    """Tell whether this matrix is never quantised: the value decoder."""
    return parameter.endswith(".v_b_proj.weight")


def block_size_for(config: ModelConfig, precision: str, block_size: int | None = None) -> int | None:
    """Return the block size that weights are quantised with, None for whole channels and where nothing is quantised.

    Args:
        config: the model's sizes.
        precision: one of ``PRECISIONS``.
        block_size: what is asked for; the precision's own by default.

    Raises:
        InputError: the precision is unknown, or does not go with this block size and model.
    """
    if precision not in PRECISIONS:
        raise InputError(*unknown("precision is {}; expected one of {}", precision, PRECISIONS))
    if precision not in BITS:
        if block_size is not None:
            raise InputError(f"precision is {precision}, which has no blocks", "a block size goes with int8 or int4")
        return None
    if block_size is None and precision == "int8":
        if config.hidden_size % 4:
            raise InputError(f"hidden_size is {config.hidden_size}", "int8 needs a multiple of 4: use fp16 or bf16")
        return None
    block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    shapes = config.parameter_shapes()
    matrices = {name: shapes[name][1] for name in shapes if len(shapes[name]) == 2 and not is_kept(name)}
    possible = [size for size in BLOCK_SIZES if not any(inputs % size for inputs in matrices.values())]
    if block_size not in possible:
        unfit = {name: n for name, n in matrices.items() if block_size in BLOCK_SIZES and n % block_size}
        odd = next((f"; {name} has {n} inputs" for name, n in unfit.items()), "")
        choice = f"one of {', '.join(map(str, possible))}" if possible else "none fits; use a wider precision"
        raise InputError(f"block size is {brief(block_size)}", f"expected {choice}{odd}")
    return block_size


def storage_for(
    config: ModelConfig, precision: str, block_size: int | None = None, embedding_precision: str | None = None
) -> Storage:
    """Return how an export stores a model's matrices.

    Args:
        config: the model's sizes.
        precision: one of ``PRECISIONS``.
        block_size: what is asked for; the precision's own by default.
        embedding_precision: of the embedding and the head in int4, ``int8`` (the default) or ``int4``.

    Raises:
        InputError: a precision is unknown, or does not go with another option or the model.
    """
    block_size = block_size_for(config, precision, block_size)
    if embedding_precision is not None and precision != "int4":
        raise InputError(f"precision is {precision}", "a precision of the embedding goes with int4")
    if embedding_precision not in (None, *BITS):
        raise InputError(*unknown("the embedding's precision is {}; expected one of {}", embedding_precision, BITS))
    wide = precision == "int4" and embedding_precision != "int4"
    tables = {EMBEDDING, HEAD} & config.parameter_shapes().keys()
    return Storage(precision, block_size, frozenset(tables if wide else ()))


def stored_dtype(rank: int, precision: str) -> np.dtype[Any]:
    """Return the type that a parameter of this rank is stored in, if it is not quantised.

    In int8 and int4 such a matrix is stored in float16.
    """
    matrix = "fp16" if precision in BITS else precision
    return DTYPES[matrix if rank > 1 else "fp32"].numpy


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
