"""Memory layout of the quantised matrices of ``BlockwiseInt4MatMul`` and ``BlockwiseInt8MatMul``.

The layout is that of the left operand of the tensor cores' ``mma.m16n8k16``, whose rows are output channels: what a
lane needs of a tile of 16 outputs and 64 (int4) or 32 (int8) inputs are 16 bytes in a row, and a warp reads 512. With
K inputs padded to ``Kp``, a multiple of 128, and N outputs padded to ``Np``, a multiple of 16 (weight 0, scale 0), and
lane ``4 g + t``, g < 8, t < 4:

    int4: weight int32 [Np/16, Kp/64, 32, 4]; in word w, nibble 4·odd + 2·k8 + h (from the lowest) is
          8 + weight of output 16·tile_n + 8·h + g and input 64·tile_k + 16·w + 8·k8 + 2·t + odd
    int8: weight int32 [Np/16, Kp/32, 32, 4]; in word 2·s + k8, byte 2·h + odd is
          128 + weight of output 16·tile_n + 8·h + g and input 32·tile_k + 16·s + 8·k8 + 2·t + odd
    scale float16 [Np/16, Kp/128, 8, 128/block, 2]: element (tile_n, j, g, b, h) belongs to output
          16·tile_n + 8·h + g and inputs 128·j + block·b and on
          [Np/16, 1, 8, 1, 2] where there is one scale per output channel (block size 0)

Matrices that share their input follow each other along the first axis. Nothing here needs more than numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_SIZES", "INPUTS_MULTIPLE", "OUTPUTS_MULTIPLE", "Packed", "pack", "packed_shapes", "unpack"]

INPUTS_MULTIPLE = 128
"""Inputs are padded to a multiple of this."""

OUTPUTS_MULTIPLE = 16
"""Outputs are padded to a multiple of this."""

BLOCK_SIZES = {4: (32, 64, 128), 8: (0, 32, 64, 128)}
"""By the bits of a weight, the numbers of inputs that may share a scale; 0 is one scale per output channel."""

_TILE_INPUTS = {4: 64, 8: 32}
_SLICE_BYTES = 2**20
"""Weights that are repacked at once: what is beside the result stays small, and mostly in the processor's cache."""

Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Packed:
    """A matrix, or several side by side, as the ops take it.

    Attributes:
        weight: int32 [Np/16, Kp/64, 32, 4] of int4, [Np/16, Kp/32, 32, 4] of int8.
        scale: float16 [Np/16, Kp/128, 8, 128/block_size, 2], or [Np/16, 1, 8, 1, 2] per output channel.
    """

    weight: npt.NDArray[np.int32]
    scale: Scales


def packed_shapes(
    in_features: int, out_features: int, bits: int, block_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the packed weight and of the packed scale of a matrix [in_features, out_features].

    Raises:
        ValueError: there is no such packing.
    """
    if bits not in BLOCK_SIZES:
        raise ValueError(f"weights of {bits} bits; expected 4 or 8")
    if block_size not in BLOCK_SIZES[bits]:
        allowed = ", ".join(map(str, BLOCK_SIZES[bits]))
        raise ValueError(f"int{bits} in blocks of {block_size}; expected one of {allowed}")
    if in_features < 1 or out_features < 1:
        raise ValueError(f"a matrix of [{in_features}, {out_features}]; expected at least one input and one output")
    tiles = -(-out_features // OUTPUTS_MULTIPLE)
    spans = -(-in_features // INPUTS_MULTIPLE)
    weight = (tiles, spans * INPUTS_MULTIPLE // _TILE_INPUTS[bits], 32, 4)
    return weight, (tiles, spans, 8, INPUTS_MULTIPLE // block_size, 2) if block_size else (tiles, 1, 8, 1, 2)


def pack(codes: Codes, scales: Scales, bits: int, block_size: int) -> Packed:
    """Return a matrix in the ops' layout.

    Args:
        codes: quantised weights, int8 [K, N]; from -8 to 7 where ``bits`` is 4.
        scales: float16 [K / block_size, N], or [N] where ``block_size`` is 0, as DequantizeLinear takes them.
        bits: 4 or 8.
        block_size: 32, 64 or 128; in int8 also 0, one scale per output channel.

    Raises:
        ValueError: a type, a shape or a weight does not fit.
    """
    if codes.ndim != 2 or codes.dtype != np.int8:
        raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}; expected int8 [K, N]")
    k, n = codes.shape
    weight_shape, scale_shape = packed_shapes(k, n, bits, block_size)
    _check_scales(scales, k, n, block_size)
    weight = np.empty(weight_shape, np.int32)
    for tiles in _slices(weight_shape):
        first, last = tiles.start * OUTPUTS_MULTIPLE, min(tiles.stop * OUTPUTS_MULTIPLE, n)
        weight[tiles] = (_pack_int4 if bits == 4 else _pack_int8)(codes[:, first:last], weight[tiles].shape)
    return Packed(weight, _pack_scales(scales, scale_shape))


def unpack(packed: Packed, in_features: int, out_features: int, bits: int, block_size: int) -> tuple[Codes, Scales]:
    """Undo ``pack``: return quantised weights int8 [K, N], and scales float16 [K / block_size, N] or [N].

    Args:
        packed: one matrix.
        in_features: K.
        out_features: N.
        bits: 4 or 8.
        block_size: as packed.

    Raises:
        ValueError: the arrays are not of the type or shape that such a matrix has.
    """
    weight_shape, scale_shape = packed_shapes(in_features, out_features, bits, block_size)
    wanted: tuple[tuple[str, npt.NDArray[Any], str, tuple[int, ...]], ...] = (
        ("weight", packed.weight, "int32", weight_shape),
        ("scale", packed.scale, "float16", scale_shape),
    )
    for name, array, dtype, shape in wanted:
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"the packed {name} is {found}; expected {dtype} {list(shape)}")
    if block_size and in_features % block_size:
        raise ValueError(f"{in_features} inputs are no multiple of the block size {block_size}")
    codes = np.empty((in_features, out_features), np.int8)
    for tiles in _slices(weight_shape):
        first, last = tiles.start * OUTPUTS_MULTIPLE, min(tiles.stop * OUTPUTS_MULTIPLE, out_features)
        whole = (_unpack_int4 if bits == 4 else _unpack_int8)(packed.weight[tiles])
        codes[:, first:last] = whole[:in_features, : last - first]
    return codes, _unpack_scales(packed.scale, in_features, out_features, block_size)


def _check_scales(scales: Scales, k: int, n: int, block_size: int) -> None:
    if block_size and k % block_size:
        raise ValueError(f"{k} inputs are no multiple of the block size {block_size}")
    wanted = (k // block_size, n) if block_size else (n,)
    if scales.dtype != np.float16 or scales.shape != wanted:
        found = f"{scales.dtype} {list(scales.shape)}"
        raise ValueError(f"scales are {found}; expected float16 {list(wanted)} for codes of [{k}, {n}]")


def _slices(weight_shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the tiles along the outputs."""
    tiles, bytes_per_tile = weight_shape[0], weight_shape[1] * 512
    step = max(1, _SLICE_BYTES // bytes_per_tile)
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


def _padded(codes: Codes, inputs: int, tiles: int, offset: int) -> npt.NDArray[np.uint8]:
    """Return ``codes + offset`` as uint8 [inputs, 16·tiles], with the offset itself as padding."""
    k, n = codes.shape
    whole = np.full((inputs, OUTPUTS_MULTIPLE * tiles), offset, np.uint8)
    np.add(codes.view(np.uint8), np.uint8(offset), out=whole[:k, :n])  # wraps as it should
    return whole


def _pack_int4(codes: Codes, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    nibbles = _padded(codes, shape[1] * 64, shape[0], 8)
    if nibbles.max() > 15:
        raise ValueError(f"weights from {codes.min()} to {codes.max()}; expected -8 to 7 for int4")
    nibbles = nibbles.reshape(shape[1], 4, 2, 4, 2, shape[0], 2, 8)  # [tile_k, w, k8, t, odd, tile_n, h, g]
    octets = nibbles[..., 0, :] | nibbles[..., 1, :] << np.uint8(4)
    words = np.ascontiguousarray(octets.transpose(5, 0, 6, 3, 1, 4, 2))  # [tile_n, tile_k, g, t, w, odd, k8]
    return words.reshape(-1).view("<i4").reshape(shape)


def _unpack_int4(weight: npt.NDArray[np.int32]) -> Codes:
    tiles_n, tiles_k = weight.shape[:2]
    octets = np.ascontiguousarray(weight, "<i4").reshape(-1).view(np.uint8).reshape(tiles_n, tiles_k, 8, 4, 4, 2, 2)
    turned = octets.transpose(1, 4, 6, 3, 5, 0, 2)  # [tile_k, w, k8, t, odd, tile_n, g]
    nibbles = np.stack((turned & np.uint8(15), turned >> np.uint8(4)), axis=-2)  # h before g
    return (nibbles - np.uint8(8)).view(np.int8).reshape(tiles_k * 64, tiles_n * OUTPUTS_MULTIPLE)


def _pack_int8(codes: Codes, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    octets = _padded(codes, shape[1] * 32, shape[0], 128)
    octets = octets.reshape(shape[1], 2, 2, 4, 2, shape[0], 2, 8)  # [tile_k, s, k8, t, odd, tile_n, h, g]
    words = np.ascontiguousarray(octets.transpose(5, 0, 7, 3, 1, 2, 6, 4))  # [tile_n, tile_k, g, t, s, k8, h, odd]
    return words.reshape(-1).view("<i4").reshape(shape)


def _unpack_int8(weight: npt.NDArray[np.int32]) -> Codes:
    tiles_n, tiles_k = weight.shape[:2]
    octets = np.ascontiguousarray(weight, "<i4").reshape(-1).view(np.uint8).reshape(tiles_n, tiles_k, 8, 4, 2, 2, 2, 2)
    turned = octets.transpose(1, 4, 5, 3, 7, 0, 6, 2)  # [tile_k, s, k8, t, odd, tile_n, h, g]
    return (turned - np.uint8(128)).view(np.int8).reshape(tiles_k * 32, tiles_n * OUTPUTS_MULTIPLE)


def _pack_scales(scales: Scales, shape: tuple[int, ...]) -> Scales:
    tiles, spans, _, blocks, _ = shape
    rows = scales.reshape(-1, scales.shape[-1])
    whole = np.zeros((spans * blocks, tiles * OUTPUTS_MULTIPLE), np.float16)
    whole[: rows.shape[0], : rows.shape[1]] = rows
    split = whole.reshape(spans, blocks, tiles, 2, 8)  # [j, b, tile_n, h, g]
    return np.ascontiguousarray(split.transpose(2, 0, 4, 1, 3))


def _unpack_scales(scale: Scales, k: int, n: int, block_size: int) -> Scales:
    tiles, spans, _, blocks, _ = scale.shape
    whole = scale.transpose(1, 3, 0, 4, 2).reshape(spans * blocks, tiles * OUTPUTS_MULTIPLE)
    return np.ascontiguousarray(whole[: k // block_size, :n] if block_size else whole[0, :n])
