"""What is given to a session, checked: token ids, lengths, arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.support.text import brief

__all__ = ["are_integers", "as_array", "checked_ids", "checked_lengths"]

Integers = npt.NDArray[np.int64]


def checked_ids(ids: Any, vocab_size: int) -> Integers:
    """Return token ids, int64 [B, T].

    Raises:
        InputError: they are no integers, of another shape, or outside the vocabulary.
    """
    array = as_array(ids, "ids")
    if array.ndim != 2 or 0 in array.shape or not are_integers(array):
        raise InputError(
            f"ids are {array.dtype} of shape {list(array.shape)}",
            "expected integers [B, T] with at least one token",
        )
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise InputError(f"token id {brief(int(outside[0]))} is outside the vocabulary: 0 to {vocab_size - 1}")
    return np.ascontiguousarray(array, np.int64)


def checked_lengths(lengths: Any, batch: int, tokens: int) -> Integers:
    """Return how many tokens of each row are real, int64 [B]; all by default.

    Raises:
        InputError: they are no whole numbers from 0 to ``tokens``, one per row, or all 0.
    """
    if lengths is None:
        return np.full(batch, tokens, np.int64)
    array = as_array(lengths, "lengths")
    if array.shape != (batch,) or array.dtype.kind not in "iu":
        raise InputError(f"lengths are {lengths!r}", f"expected {batch} whole numbers, one per row")
    if (array < 0).any() or (array > tokens).any():
        raise InputError(f"lengths are {array.tolist()}", f"expected 0 to {tokens}, the width of the ids")
    if not array.any():
        raise InputError(f"lengths are {array.tolist()}", "expected at least one row with a token")
    return array.astype(np.int64)


def are_integers(array: npt.NDArray[Any]) -> bool:
    """Tell whether an array holds integers; those beyond 64 bits make it one of objects, and are to be named."""
    return array.dtype.kind in "iu" or (array.dtype.kind == "O" and all(type(entry) is int for entry in array.flat))


def as_array(value: Any, what: str) -> npt.NDArray[Any]:
    """Return an array of what was given, called so in the message.

    Raises:
        InputError: rows differ in length.
    """
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"{what}: rows differ in length", "pad them on the right and give lengths=") from error
