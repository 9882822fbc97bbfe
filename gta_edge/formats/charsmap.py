"""The ``precompiled_charsmap`` of a sentencepiece normalizer, checked before the ``tokenizers`` library walks it.

The map is a double-array trie from strings to offsets into a blob of replacements, each ended by a NUL:

    uint32 size of the trie in bytes | the trie, uint32 units | the replacements, UTF-8

The library follows it without checks: a unit that leads out of the array, or an offset that is none, ends in a panic
in the middle of a text, and a size that is not there in memory for gigabytes. So every unit that any text can reach is
visited here once, and what a text could meet is known to be in bounds.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np
import numpy.typing as npt

__all__ = ["check_charsmap"]

_Units = npt.NDArray[np.int64]

_MAX_BYTES = 4 * 2**20  # sentencepiece's own maps have 0.3 MB
_BLOCK = 256  # units: a trie is made of whole blocks, and children share one
_MAX_RULE_BYTES = 64


def check_charsmap(encoded: str) -> int:
    """Check a map as ``tokenizer.json`` holds it, in base64.

    Returns:
        How many bytes one byte of a text becomes at most.

    Raises:
        ValueError: it is no map, or leads out of its bounds.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"it is not base64: {error}") from error
    if len(data) < 4:
        raise ValueError("it ends before its size")
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes; expected at most {_MAX_BYTES}")
    size = int.from_bytes(data[:4], "little")
    if not 0 < size <= len(data) - 4:
        raise ValueError(f"it says that its trie has {size} bytes, and {len(data) - 4} follow")
    if size % (4 * _BLOCK):
        raise ValueError(f"its trie has {size} bytes; expected whole blocks of {4 * _BLOCK}")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    replacements = data[4 + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"its replacements are not UTF-8 at byte {error.start}") from error
    return _check_values(_reachable_values(units), replacements)


def _reachable_values(units: _Units) -> _Units:
    """Return the offsets that texts can lead to, of a trie whose every reachable unit is in bounds."""
    labels = units & ((1 << 31) | 0xFF)
    offsets = (units >> 10) << np.where(units & (1 << 9), 8, 0)  # 21 bits, in large tries 8 more
    has_leaf = (units >> 8) & 1 == 1
    is_child = (labels > 0) & (labels < 256)  # a NUL of a text ends the search
    base_of = np.arange(len(units)) ^ np.where(
        is_child, labels, 0
    )  # of which base a unit is a child: in the same block

    seen = np.zeros(len(units), bool)
    values = [np.zeros(0, np.int64)]
    bases = offsets[:1]  # where the children of a level begin, [N]
    for _ in range(_MAX_RULE_BYTES):
        if bases.size and int(bases.max()) >= len(units):  # a base's whole block is in bounds with it
            raise ValueError("its trie leads out of its bounds")
        is_base = np.zeros(len(units), bool)
        is_base[bases] = True
        children = np.flatnonzero(is_child & is_base[base_of] & ~seen)
        if not children.size:
            return np.unique(np.concatenate(values))
        seen[children] = True  # a trie has no circles, but this may be none
        bases = children ^ offsets[children]
        leaves = bases[has_leaf[children]]
        if leaves.size and int(leaves.max()) >= len(units):
            raise ValueError("its trie leads out of its bounds")
        values.append(units[leaves] & 0x7FFFFFFF)
    raise ValueError(f"it has rules for more than {_MAX_RULE_BYTES} bytes")


def _check_values(values: _Units, replacements: bytes) -> int:
    """Check that each offset begins a replacement; return the longest one's bytes, at least 1."""
    if values.size and int(values.max()) > len(replacements):
        raise ValueError(f"it points to byte {int(values.max())} of {len(replacements)} bytes of replacements")
    text = np.frombuffer(replacements + b"\0", np.uint8)
    if ((text[values] & 0xC0) == 0x80).any():
        raise ValueError("it points into the middle of a character")
    ends = np.flatnonzero(text == 0)
    return max(1, int((ends[np.searchsorted(ends, values)] - values).max(initial=0)))
