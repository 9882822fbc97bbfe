"""The cache of a session in blocks, of 4 bits: what its bookkeeping has to heed beside rows.

A block of 32 tokens is quantised when its last one comes; until then its rows lie as they are in an open block, of
which each sequence has one (``model.kv_cache``). So

* capacities are whole blocks;
* no padding is run, which would take the place of rows in the open block: a step ends where a sequence's tokens end,
  and who has none in a step is told to be full, so that nothing of it is written;
* ``truncate`` into a block that the open block holds no more puts there what its codes stand for, which costs these
  tokens a second rounding when the block is full again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.model.kv_cache import CacheTensor, capacity_of, is_open, is_scale, open_name, scale_name
from gta_edge.numerics.cache_codes import BLOCK, dequantize_keys, dequantize_values
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.runtime.cache_state import CacheState, Lengths, Part

if TYPE_CHECKING:
    from gta_edge.model.config import ModelConfig
    from gta_edge.runtime.cache_moves import CacheMemory

__all__ = ["BlockCache", "reopened"]


class BlockCache(CacheState):
    """The cache of one session in blocks, without its memory.

    Args:
        config: the model's sizes.
        dtype: one of ``BLOCK_CACHE_TYPES``.
        options: as ``CacheState`` takes them.
    """

    def __init__(self, config: ModelConfig, dtype: str, **options: Any) -> None:
        super().__init__(config, dtype, **options)
        self._unpacked = 3  # unpacked, without what nobody sees, and with the rows behind that are not in codes
        self._held = np.zeros(1, np.int64)  # [B], which block each open block holds, or held last

    @property
    def held_blocks(self) -> Lengths:
        """Which block the open block of each sequence holds, int64 [B]."""
        return self._held if self._held.shape == self.length.shape else np.zeros_like(self.length)

    def capacity_for(self, tokens: int) -> int:
        return capacity_of(self.dtype, super().capacity_for(tokens))

    def reached(self, part: Part, past: Lengths) -> Lengths:
        return past + part.real

    def past_of(self, part: Part, past: Lengths) -> Lengths:
        return np.where(part.real[part.rows] > 0, past, self.capacity)

    def reusable(self, held: int, tokens: int) -> int:
        # of whole blocks it is not known whether the open block holds the last of them: it may hold a later one
        in_open_block = tokens == held or tokens // BLOCK == held // BLOCK
        return tokens if in_open_block else tokens // BLOCK * BLOCK

    def put(self, row: int, tokens: int) -> None:
        held = self.held_blocks.copy()
        held[row] = tokens // BLOCK
        super().put(row, tokens)
        self._held = held

    def copy(self, source: int, targets: Sequence[int]) -> None:
        super().copy(source, targets)
        self._held[list(targets)] = self._held[source]  # an array of its own since then

    def cut(self, arrays: dict[str, npt.NDArray[Any]], held: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        block = tokens // BLOCK
        if tokens % BLOCK == 0 or block == held // BLOCK:
            return arrays
        tensors = {each.name: each for each in self.tensors}
        codes = [name for name in arrays if not is_scale(name) and not is_open(name)]
        return arrays | {open_name(n): reopened(tensors, arrays, n, block) for n in codes}

    def _parts(self, counts: Lengths, tokens: int) -> list[Part]:
        ends = sorted({0, tokens, *counts.tolist()} | set(range(0, tokens, self.chunk_size)))
        chunks = super()._parts(counts, tokens)
        return [
            Part(start, stop, counts, next(part.chunk for part in chunks if start < part.stop))
            for start, stop in pairwise(ends)
        ]

    def append(self, part: Part, memory: CacheMemory) -> Lengths:
        held = self.held_blocks
        length = super().append(part, memory)
        self._held = np.where(part.real > 0, (length - 1) // BLOCK, held)
        return length

    def truncate(self, length: npt.NDArray[Any], given: Any, memory: CacheMemory | None = None) -> None:
        stays, held = self._checked_truncation(length, given), self.held_blocks.copy()
        blocks = stays // BLOCK
        try:
            for row in np.flatnonzero((stays % BLOCK > 0) & (blocks != held)).tolist():
                assert memory is not None  # a session gives itself
                memory._reopen(row, int(blocks[row]))
                held[row] = blocks[row]
        except BaseException:  # some hold what the length does not say
            self.reset()
            raise
        self.length, self._held = stays, held

    def revocable(self) -> int | None:
        """Return how many tokens after its first a call may have that ``truncate`` takes back without a trace.

        Those up to the end of the block that the second of them lies in.
        """
        return int((BLOCK - (self.length + 1) % BLOCK).min())


def reopened(
    tensors: Mapping[str, CacheTensor], arrays: Mapping[str, npt.NDArray[Any]], name: str, block: int
) -> npt.NDArray[Any]:
    """Return what an open block is when a block's codes are put there, of one sequence, [1, n, 32, d].

    Args:
        tensors: of the cache by name.
        arrays: the codes ``name`` and their scales, of one sequence and as many tokens as there are.
        name: of keys, or of values or latents: ``key.0``.
        block: which.
    """
    codes, opened = tensors[name], tensors[open_name(name)]
    rows = slice(block, block + 1) if codes.block == BLOCK else slice(block * BLOCK, (block + 1) * BLOCK)
    held, scales = arrays[name][:, :, rows], arrays[scale_name(name)][:, :, rows].astype(np.float32)
    if codes.block == BLOCK:
        values = dequantize_keys(held, scales)
    else:
        values = dequantize_values(held, scales, 8 * held.shape[-1] // opened.row[0])
    found: npt.NDArray[Any] = np.zeros(opened.shape(1, 0), DTYPES[opened.dtype].numpy)
    found[:, :, : values.shape[2]] = values  # fewer, where so many tokens are looked at
    return found
