"""How a cache of 4 bits, or of 4 and 2, rounds values to codes, and how codes lie in bytes: the one place for both.

Tokens are quantised in blocks of 32, rows 32 b to 32 b + 31 of a sequence (after KIVI, arXiv 2402.02750). Values that
share a scale and a minimum, a group, are

    of keys                 one channel's values over the tokens of a block
    of values or latents    one token's values over the channels of a head

With x the group's values as the compute type holds them, all in float32, to nearest even:

    scale   = float16((max x - min x) · (1 / levels)), at least 2^-24     levels = 15 of 4 bits, 3 of 2
    minimum = float16(min x)
    code    = round((x - minimum) · (1 / scale)), from 0 to levels
    value   = code · scale + minimum

A group whose values are all equal has the smallest scale, so nothing is divided by zero, and a log of it is finite.
Where a scale or minimum is not finite (a value is infinite or NaN, or too large for float16) the scale is NaN and the
codes are 0, so that every value of the group reads as NaN.

The i-th of the codes that share a byte is in its bits from i · width on, the lowest first. What is here takes arrays of
NumPy as well as torch's tensors; who quantises, does so in its own library's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BLOCK", "MIN_SCALE", "dequantize_keys", "dequantize_values", "inverse_levels", "levels", "pack", "unpack"]

BLOCK = 32
"""Tokens of a block."""

MIN_SCALE = 2.0**-24
"""The smallest scale, and float16's smallest positive number."""

Array = Any
"""An array of NumPy or a tensor of torch."""


def levels(bits: int) -> int:
    """Return the largest code."""
    return int(2**bits - 1)


def inverse_levels(bits: int) -> float:
    """Return one over the largest code as float32 has it, which ranges are multiplied by."""
    return float(np.float32(1) / np.float32(levels(bits)))


def pack(codes: Array, bits: int) -> Array:
    """Return codes uint8 [..., N] in bytes, uint8 [..., N · bits / 8]."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    packed = parts[..., 0]
    for i in range(1, 8 // bits):
        packed = packed | parts[..., i] << bits * i
    return packed


def unpack(packed: Array, bits: int, stack: Callable[..., Array] = np.stack) -> Array:
    """Undo ``pack``; ``stack`` is the library's."""
    parts = [packed >> bits * i & levels(bits) for i in range(8 // bits)]
    return stack(parts, -1).reshape(*packed.shape[:-1], -1)


def dequantize_keys(codes: Array, scales: Array, stack: Callable[..., Array] = np.stack) -> Array:
    """Return keys in the scales' type.

    Args:
        codes: uint8 [..., S / 32, d_k, 16], a channel's 32 tokens together.
        scales: [..., S / 32, 2, d_k], scale and minimum of each channel.
        stack: the library's.

    Returns:
        [..., S, d_k]
    """
    unpacked = unpack(codes, 4, stack).swapaxes(-1, -2)  # [..., S / 32, 32, d_k]
    values = unpacked * scales[..., :1, :] + scales[..., 1:, :]
    return values.reshape(*codes.shape[:-3], -1, codes.shape[-2])


def dequantize_values(codes: Array, scales: Array, bits: int, stack: Callable[..., Array] = np.stack) -> Array:
    """Return values or latents in the scales' type.

    Args:
        codes: uint8 [..., S, d · bits / 8].
        scales: [..., S, 2], scale and minimum of each token.
        bits: width of a code.
        stack: the library's.

    Returns:
        [..., S, d]
    """
    return unpack(codes, bits, stack) * scales[..., :1] + scales[..., 1:]
