"""How a cache of 4 bits, or of 4 and 2, rounds values to codes, and how codes lie in bytes: the one place for both.

Tokens are quantised in blocks of 32, rows 32 b to 32 b + 31 of a sequence (after KIVI, arXiv 2402.02750). Values that
share a scale and a minimum, a group, are

    of keys                 one channel's values over the tokens of a block
    of values or latents    one token's values over the channels of a head

With x the group's values as the compute type holds them, all in float32, to nearest even:

    step    = (max x - min x) / 2^bits
    scale   = float16(step), at least 2^-24
    minimum = float16(min x + step / 2)
    code    = round((x - minimum) · (1 / scale)), from 0 to 2^bits - 1
    value   = code · scale + minimum

So the range is divided into as many parts as there are codes, and a value is read as the middle of its part: it is off
by half a step, where codes at both ends of the range would have it off by up to a sixth of the range in 2 bits.
A group whose values are all equal has the smallest scale, so nothing is divided by zero, and a log of it is finite.
Where a value is NaN or infinite, or a scale or minimum too large for float16, both are NaN and the group's codes are 0,
so that it reads as NaN.

Codes lie as the kernels' matmuls take them. A unit is 8 words of 16 bits, little-endian; of W words that hold c codes
each, word w has in its n-th bits, from the lowest on, the code W n + w of the unit's. A key channel's 32 tokens are a
unit; a token's channels are as many units as there are, and what is left over is one of fewer words.

Functions take arrays of NumPy and tensors of torch; who quantises, does so in its own library's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "BLOCK",
    "MIN_SCALE",
    "WORD_BITS",
    "dequantize_keys",
    "dequantize_values",
    "levels",
    "pack",
    "unpack",
]

BLOCK = 32
"""Tokens of a block."""

MIN_SCALE = 2.0**-24
"""The smallest scale, and float16's smallest positive number."""

WORD_BITS = 16
"""What the codes of a token have to fill a multiple of."""

_UNIT_WORDS = 8

Array = Any
"""An array of NumPy or a tensor of torch."""

Join = Callable[..., Array]
"""A library's own, which joins arrays along an axis: ``numpy.concatenate``, ``torch.cat``."""


def _concatenate(arrays: list[Array], axis: int) -> Array:
    import numpy as np  # not at once: sizes of blocks are asked for by what loads nothing

    return np.concatenate(arrays, axis)


def levels(bits: int) -> int:
    """Return the largest code."""
    return int(2**bits - 1)


def pack(codes: Array, bits: int, join: Join = _concatenate) -> Array:
    """Return codes uint8 [..., N] in bytes, uint8 [..., N · bits / 8]; N · bits is a multiple of 16."""
    packed = []
    for part, words in _units(codes, WORD_BITS // bits):
        # [..., units, 2, codes per byte, words] -> [..., units, words, 2, codes per byte]
        by_byte = part.reshape(*codes.shape[:-1], -1, 2, 8 // bits, words).swapaxes(-1, -2).swapaxes(-2, -3)
        held = by_byte[..., 0]
        for i in range(1, 8 // bits):
            held = held | by_byte[..., i] << bits * i
        packed.append(held.reshape(*codes.shape[:-1], -1))
    return packed[0] if len(packed) == 1 else join(packed, -1)


def unpack(packed: Array, bits: int, join: Join = _concatenate) -> Array:
    """Undo ``pack``."""
    codes = []
    for part, words in _units(packed, WORD_BITS // 8):
        held = part.reshape(*packed.shape[:-1], -1, words, 2)
        by_byte = join([(held >> bits * i & levels(bits))[..., None] for i in range(8 // bits)], -1)
        codes.append(by_byte.swapaxes(-2, -3).swapaxes(-1, -2).reshape(*packed.shape[:-1], -1))
    return codes[0] if len(codes) == 1 else join(codes, -1)


def _units(array: Array, per_word: int) -> list[tuple[Array, int]]:
    """Return the part of ``array`` [..., N] that is whole units, and what is left over, with the words of each unit."""
    count = array.shape[-1]
    whole = count - count % (_UNIT_WORDS * per_word)
    parts = [(array[..., :whole], _UNIT_WORDS), (array[..., whole:], (count - whole) // per_word)]
    return [(part, words) for part, words in parts if part.shape[-1]]


def dequantize_keys(codes: Array, scales: Array, join: Join = _concatenate) -> Array:
    """Return keys in the scales' type.

    Args:
        codes: uint8 [..., S / 32, d_k, 16], a channel's 32 tokens together.
        scales: [..., S / 32, 2, d_k], scale and minimum of each channel.
        join: the library's.

    Returns:
        [..., S, d_k]
    """
    unpacked = unpack(codes, 4, join).swapaxes(-1, -2)  # [..., S / 32, 32, d_k]
    values = unpacked * scales[..., :1, :] + scales[..., 1:, :]
    return values.reshape(*codes.shape[:-3], -1, codes.shape[-2])


def dequantize_values(codes: Array, scales: Array, bits: int, join: Join = _concatenate) -> Array:
    """Return values or latents in the scales' type.

    Args:
        codes: uint8 [..., S, d · bits / 8].
        scales: [..., S, 2], scale and minimum of each token.
        bits: width of a code.
        join: the library's.

    Returns:
        [..., S, d]
    """
    return unpack(codes, bits, join) * scales[..., :1] + scales[..., 1:]
