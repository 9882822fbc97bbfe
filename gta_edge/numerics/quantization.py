"""Weights as small integers: codes in symmetric blocks along the input dimension, one float16 scale for each.

A weight ``w`` in a block with scale ``s`` is stored as the integer ``q`` nearest to ``w / s``, and means ``q · s``.
Scales minimise the squared error of their block. For given codes the best scale is known in closed form,
``s = Σ w q / Σ q²``, which leaves an error of ``Σ w² - (Σ w q)² / Σ q²``: so a search over clipping points that
compares ``(Σ w q)² / Σ q²`` finds codes and scale together. Nothing here needs more than numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.numerics.dtypes import DTYPES, PRECISIONS
from gta_edge.support.cores import usable_cores

__all__ = [
    "BITS",
    "BLOCK_SIZES",
    "DEFAULT_BLOCK_SIZE",
    "QuantizedMatrix",
    "activation_block",
    "pack_nibbles",
    "quantize",
    "unpack_nibbles",
]

BITS = {name: DTYPES[name].bits for name in PRECISIONS if DTYPES[name].needs_scale}
"""Width in bits of a code, by the name of the precision."""

BLOCK_SIZES = (16, 32, 64, 128)
"""Weights that may share a scale: sizes that both ONNX Runtime's and TensorRT's kernels know."""

DEFAULT_BLOCK_SIZE = 32
"""Of int4. int8 has one scale per output channel unless a block size is given."""

_CHANNEL_BLOCKS = (64, 32, 16)

_CLIPPING = {8: np.linspace(0.80, 1.0, 6), 4: np.array([0.70, 0.76, 0.82, 0.88, 0.92, 0.96, 1.0, 1.06])}
"""Where the search puts the largest code, as fractions of the block's largest magnitude; finer gains 0.2%."""

_CHUNK_VALUES = 2**16  # the working set of a chunk stays in a core's own cache


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix in codes: what quantising one makes, and what an int8 or int4 bundle holds of it.

    A bundle stores it transposed, so its arrays may be views. Kernels take it in a layout of their own
    (``plugins.matmul.packing``).

    Attributes:
        codes: int8 [out, in], from -8 to 7 or from -127 to 127; -128 too where another tool has quantised it.
        scales: float16 [out, in / block_size], positive; [out, 1] where there is one per output channel.
        bits: width of a code, 4 or 8.
        block_size: inputs that share a scale; 0 where there is one per output channel.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    bits: int
    block_size: int = 0

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """What is meant, float32 [out, in], as in a checkpoint."""
        rows, blocks = self.scales.shape
        with np.errstate(all="ignore"):  # of damaged scales, which are as they are
            split = self.codes.reshape(rows, blocks, -1) * self.scales.astype(np.float32)[:, :, None]
        return np.ascontiguousarray(split.reshape(self.codes.shape))

    def rows(self, start: int, stop: int) -> QuantizedMatrix:
        """The outputs from ``start`` to ``stop``, as a matrix of their own; its arrays are views."""
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop])

    @property
    def stored_codes(self) -> npt.NDArray[np.int8]:
        """The codes as a bundle stores them, int8 [in, out]; a view."""
        return self.codes.T

    @property
    def stored_scales(self) -> npt.NDArray[np.float16]:
        """The scales as a bundle stores them: float16 [in / block_size, out], or [out] per output channel; a view."""
        return self.scales.T if self.block_size else self.scales[:, 0]


def quantize(weight: npt.NDArray[Any], bits: int, block_size: int | None = None) -> QuantizedMatrix:
    """Return the codes and scales that come nearest to ``weight``, on all cores.

    Args:
        weight: floating point [out, in].
        bits: 8 or 4.
        block_size: weights along ``in`` that share a scale, a divisor of it; None for one scale per output channel.

    Raises:
        OverflowError: a scale is too large for float16, or the weight is not finite.
    """
    rows, columns = weight.shape
    size = block_size or columns
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // size), np.float16)
    step = max(1, _CHUNK_VALUES // columns)

    def work(start: int) -> None:
        part = slice(start, start + step)
        blocks = weight[part].astype(np.float32).reshape(-1, size)
        scales[part] = best_scales(blocks, bits).reshape(-1, columns // size)
        codes[part] = to_codes(blocks, scales[part].reshape(-1), bits).reshape(-1, columns)

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(work, range(0, rows, step)))
    if not np.isfinite(scales).all():
        raise OverflowError("it holds values that are not finite, or too large for a float16 scale")
    return QuantizedMatrix(codes, scales, bits, block_size or 0)


def best_scales(
    blocks: npt.NDArray[np.float32], bits: int, importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float16]:
    """Return a float16 scale [N] for each row of ``blocks`` [N, block_size].

    Args:
        blocks: weights that share a scale.
        bits: 8 or 4.
        importance: factors [N or 1, block_size] of the squared errors, positive; all alike by default.
    """
    with np.errstate(over="ignore"):  # reported once, for the whole matrix
        return _search(blocks, bits, importance).astype(np.float16)


def to_codes(blocks: npt.NDArray[np.float32], scales: npt.NDArray[np.float16], bits: int) -> npt.NDArray[np.int8]:
    """Return the nearest codes, int8 [N, block_size], for ``scales`` [N]."""
    lowest, highest = code_range(bits)
    with np.errstate(invalid="ignore"):  # what is not finite is reported once, for the whole matrix
        ratio = blocks / scales.astype(np.float32)[:, None]
        return np.clip(np.rint(ratio, out=ratio), lowest, highest, out=ratio).astype(np.int8)


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and highest code: int4 uses all sixteen, int8 is symmetric."""
    return (-8, 7) if bits == 4 else (-127, 127)


def _search(
    blocks: npt.NDArray[np.float32], bits: int, importance: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    lowest, highest = code_range(bits)
    largest = _largest(blocks)
    best = np.full(len(blocks), -1, np.float32)
    scales = np.zeros(len(blocks), np.float32)
    codes = np.empty_like(blocks)
    wanted = blocks if importance is None else blocks * importance
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # blocks of zeros, and what is not finite
        for fraction in _CLIPPING[bits]:
            np.multiply(blocks, (highest / (fraction * largest))[:, None], out=codes)
            np.rint(codes, out=codes)
            np.clip(codes, lowest, highest, out=codes)
            along = np.einsum("ij,ij->i", wanted, codes)
            square = np.einsum("ij,ij->i", codes, codes if importance is None else codes * importance)
            gain = along * along / square
            better = gain > best
            best[better] = gain[better]
            scales[better] = (along / square)[better]
        scales[~np.isfinite(largest)] = np.nan
    smallest = np.float32(np.finfo(np.float16).smallest_subnormal)  # a block of zeros, or of next to nothing
    return np.maximum(scales, smallest)  # keeps what is not a number


def _largest(blocks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the largest magnitude of each row."""
    folded = np.abs(blocks)
    while folded.shape[1] <= max(BLOCK_SIZES) and folded.shape[1] % 2 == 0:  # numpy is slow along short rows
        half = folded.shape[1] // 2
        folded = np.maximum(folded[:, :half], folded[:, half:])
    largest: npt.NDArray[np.float32] = folded.max(axis=1)
    return largest


def activation_block(in_features: int, block_size: int | None) -> int:
    """Return how many activations are rounded to int8 together, where they are, for a matrix of so many inputs.

    They share a scale as its weights do. For weights with one scale per channel it is 64, or less where there are few
    inputs: in blocks of 256, which cost less, rounding activations raised SmolLM2-135M's perplexity by 3%, in 64 by
    0.4%, in 32 by as much.
    """
    return block_size or next((size for size in _CHANNEL_BLOCKS if size < 2 * in_features), _CHANNEL_BLOCKS[-1])


def pack_nibbles(codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Return two codes per byte, the first in the low half, as ONNX packs 4-bit integers; flat, padded with 0."""
    flat = (codes.reshape(-1) & 0xF).astype(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.bitwise_or(flat[0::2], np.left_shift(flat[1::2], np.uint8(4)))


def unpack_nibbles(packed: npt.NDArray[np.uint8], shape: Sequence[int]) -> npt.NDArray[np.int8]:
    """Undo ``pack_nibbles``: signed codes of the given shape."""
    flat = np.empty(packed.size * 2, np.int8)
    flat[0::2] = packed.reshape(-1) & 0xF
    flat[1::2] = packed.reshape(-1) >> 4
    flat[flat > 7] -= 16
    return flat[: int(np.prod(shape))].reshape(tuple(shape))
