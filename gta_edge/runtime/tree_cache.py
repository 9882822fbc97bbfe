"""The bookkeeping of a cache that holds trees of tokens beside the text of each sequence.

Rows 0 to length - 1 of a sequence are its text, its prefix; behind them lie the tokens of its tree, if it has one
(``tree_rows``). All layers have the same rows. A row is no position any more: positions are below P, and rows are
bounded by memory alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import CapacityError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import TREES
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS, Features
from gta_edge.runtime.cache_moves import CacheMemory, ManagedStep, Moves, causal_words
from gta_edge.runtime.cache_state import CacheState, Lengths, Part
from gta_edge.runtime.tree_rows import Pairs, TreeRows, routed
from gta_edge.support.text import brief

__all__ = ["TreeCache", "TreeCall"]

_MAX_ROWS = 2**30
"""Of a sequence: what the kernels' 32-bit positions can tell apart."""

_WORDS_STEP = 64  # words are as many, so that steps of one width have the same shapes for a while


class TreeCache(CacheState):
    """The cache of one session, without its memory, with a tree of tokens beside each sequence.

    Args:
        config: the model's sizes.
        dtype: of cached values, ``fp32`` or one of ``CACHE_TYPES``.
        max_rows: of a sequence, at most.
        spare: rows that there is memory for behind those of a step: at least one, for rows that change places.
        options: as ``CacheState`` takes them.

    Attributes:
        trees: those that are open, by sequence.
    """

    def __init__(
        self, config: ModelConfig, dtype: str = "fp32", *, max_rows: int = _MAX_ROWS, spare: int = 1, **options: Any
    ) -> None:
        super().__init__(config, dtype, **options)
        self._max_rows, self._spare = max_rows, spare
        self.trees: dict[int, TreeRows] = {}

    @property
    def features(self) -> Features:
        return TREES

    @property
    def in_use(self) -> Lengths:
        """Rows of each sequence, its prefix's and its tree's, int64 [B]."""
        rows = self.length.copy()
        for sequence, tree in self.trees.items():
            rows[sequence] += tree.rows
        return rows

    @property
    def rows(self) -> Lengths:
        return np.broadcast_to(self.in_use, (len(self.capacities), self.batch))

    @property
    def filled(self) -> int:
        return int(self.in_use.max(initial=0))

    def capacity_for(self, tokens: int) -> int:
        """Return the capacity for ``tokens`` per row, which may be more than there are positions."""
        found = super().capacity_for(tokens)
        return found if found >= tokens else self._in_steps(tokens)

    # --- what it holds ---------------------------------------------------------------------------------------------

    def open(self, sequence: int) -> TreeRows:
        """Open a tree behind a sequence's text.

        Raises:
            InputError: there is no such sequence, or its tree has nodes.
        """
        self._check(sequence)
        if sequence in self.trees and self.trees[sequence].nodes:
            raise InputError(f"sequence {sequence} has a tree with nodes", "accept a path of it, or close() it, first")
        tree = self.trees[sequence] = TreeRows(int(self.length[sequence]))
        return tree

    def room(self, sequence: int) -> int:
        """Return how many nodes a tree behind a sequence's text could have.

        Raises:
            InputError: there is no such sequence.
        """
        self._check(sequence)
        return max(0, self._max_rows - self._spare - int(self.length[sequence]))

    def _check(self, sequence: Any) -> None:
        if isinstance(sequence, bool) or not isinstance(sequence, Integral) or not 0 <= int(sequence) < self.batch:
            raise InputError(
                f"there is no sequence {brief(sequence)}: the cache holds {self.batch}",
                f"expected 0 to {self.batch - 1}",
            )

    def truncate(self, length: npt.NDArray[Any], given: Any, memory: CacheMemory | None = None) -> None:
        super().truncate(length, given, memory)
        self.trees = {}

    def reset(self) -> None:
        super().reset()
        self.trees = {}

    def put(self, row: int, tokens: int) -> None:
        super().put(row, tokens)
        self.trees.pop(row, None)

    def accept(self, sequence: int, node: int, memory: CacheMemory) -> None:
        """Make the path to a node part of the text; what descends from it stays, and all other nodes go."""
        tree, length = self.trees[sequence], self.length.copy()
        end = tree.start + tree.rows
        pairs = tree.accepted(node)
        length[sequence] = tree.start
        self.length = length
        self._move(sequence, end, pairs, memory)

    def _close_up(self, memory: CacheMemory) -> None:
        """Use the rows of dropped nodes again, where they are many."""
        for sequence, tree in self.trees.items():
            end = tree.start + tree.rows
            self._move(sequence, end, tree.closed_up(), memory)

    def _move(self, sequence: int, end: int, pairs: Pairs, memory: CacheMemory) -> None:
        """Copy rows of a sequence, of which ``end`` were in use; the cache is emptied where that fails."""
        tree = self.trees[sequence]
        sources = {source for source, _ in pairs}
        behind = range(tree.start + tree.rows, max(end, min(self.capacity_for(end + 1), self.capacity)))
        free = itertools.islice((row for row in behind if row not in sources), len(pairs))
        nothing = np.zeros((0, 4), np.int32), np.zeros(0, np.float32)
        layers = np.arange(len(self.capacities), dtype=np.int32)
        try:
            for copies in routed(pairs, list(free)):
                rows = np.tile(np.array([(sequence, *copy) for copy in copies], np.int32), (len(layers), 1))
                by_layer = np.repeat(layers, len(copies))[:, None]
                memory._move(Moves(np.concatenate([by_layer, rows], 1), *nothing))
        except BaseException:  # some rows have been moved
            self.reset()
            raise

    # --- a step without a tree -------------------------------------------------------------------------------------

    def plan(self, past: Lengths, counts: Lengths, *rest: Any, **options: Any) -> list[Part]:
        for sequence, tree in self.trees.items():
            if tree.nodes:
                raise InputError(
                    f"sequence {sequence} has a tree with nodes, and the tokens are none of it",
                    "give tree=, or accept a path of it or close() it first",
                )
        return super().plan(past, counts, *rest, **options)

    def prepare(self, part: Part, memory: CacheMemory) -> ManagedStep:
        """Return the inputs of a step in which each token sees those before it."""
        width, steps = part.width, np.arange(part.width)
        chain = causal_words(width)
        return self._step(
            self.length,
            self.length if len(chain) else self.length + width,
            self.length[:, None] + steps,
            [chain] * self.batch,
            causal=True,
        )

    def append(self, part: Part, memory: CacheMemory) -> Lengths:
        super().append(part, memory)
        for sequence, tree in self.trees.items():
            tree.start = int(self.length[sequence])
        return self.length

    def _step(
        self,
        rows: Lengths,
        starts: Lengths,
        positions: Lengths,
        words: Sequence[npt.NDArray[np.int64]],
        causal: bool = False,
    ) -> ManagedStep:
        """Return a step's inputs, the same rows for every layer."""
        most = max(len(each) for each in words)
        branches = np.zeros((self.batch, -(-max(most, 1) // _WORDS_STEP) * _WORDS_STEP), np.int64)
        for row, each in zip(branches, words, strict=True):
            row[: len(each)] = each
        layers = len(self.capacities)
        return ManagedStep(
            past_length=np.broadcast_to(rows, (layers, self.batch)),
            positions=positions,
            branch_start=np.broadcast_to(starts, (layers, self.batch)),
            branches=branches,
            causal=causal,
        )

    # --- a step of a tree ------------------------------------------------------------------------------------------

    @contextmanager
    def taking_back(self, memory: CacheMemory) -> Iterator[None]:
        """Run new nodes within this: where that fails, trees are left as they were before those were grown."""
        self._close_up(memory)
        before = {sequence: tree.rows for sequence, tree in self.trees.items()}
        try:
            yield
        except BaseException:
            for sequence, tree in self.trees.items():  # none where the cache was emptied
                tree.back_to(before[sequence])
            raise

    def check_tree(self, ends: Lengths, width: int, logits_bytes: int, together: int) -> None:
        """Refuse nodes that wait, where they take too much.

        Args:
            ends: rows in use then, int64 [B].
            width: nodes of a sequence that are run at once, at most.
            logits_bytes: that are returned.
            together: sequences that are computed at once.

        Raises:
            CapacityError: a node would be past the last position, or they take more memory than is available.
        """
        for sequence, tree in self.trees.items():
            last = max((tree.nodes[node].position for node in tree.waiting), default=0)
            if last >= self.max_length:
                raise CapacityError(
                    f"sequence {sequence} holds {tree.start} tokens and its tree would reach {last + 1}",
                    f"{self._limit}: truncate, reset, or give fewer",
                )
        rows = int(ends.max()) + self._spare
        if rows > self._max_rows:
            raise CapacityError(
                f"a sequence and its tree would take {rows} rows, and there can be {self._max_rows}",
                "drop nodes of the tree, or give fewer",
            )
        self.check_memory(len(ends), rows, width, logits_bytes, together)


class TreeCall:
    """One call of ``forward`` for the nodes that wait, in steps of as many as a word has bits.

    Args:
        cache: what their rows are of.
        logits_bytes: that are returned.
        choose: the rows of the batch that a step computes, as ``Part.computing`` has it.

    Attributes:
        counts: nodes of each sequence, int64 [B].
        parts: the steps.
        past: rows in use before it, int64 [B].
        spare: rows that there has to be memory for behind a step's.

    Raises:
        CapacityError: a node would be past the last position, or they take more memory than is available.
    """

    def __init__(self, cache: TreeCache, logits_bytes: int, choose: Callable[[int, int, int], slice]) -> None:
        self._cache = cache
        self._trees = [cache.trees[sequence] for sequence in range(cache.batch)]
        self.past, self.spare = cache.in_use, cache._spare
        self.counts = np.array([len(tree.waiting) for tree in self._trees], np.int64)
        tokens, width = int(self.counts.max()), min(MAX_BRANCH_TOKENS, cache.chunk_size)
        chunks = [(start, min(start + width, tokens)) for start in range(0, tokens, width)]
        self.parts = [Part(*chunk, self.counts, chunk).computing(choose) for chunk in chunks]
        together = max(len(self.counts[part.rows]) for part in self.parts)
        ends = np.max([self.past + np.minimum(self.counts, part.start) + part.width for part in self.parts], axis=0)
        cache.check_tree(ends, min(tokens, width), logits_bytes, together)

    def prepare(self, part: Part) -> ManagedStep:
        """Return the inputs of a step; tokens that pad it see nothing."""
        positions, words = np.zeros((len(self._trees), part.width), np.int64), []
        for row, tree, real in zip(positions, self._trees, part.real.tolist(), strict=True):
            new = tree.waiting[:real]
            row[:real] = [tree.nodes[node].position for node in new]
            words.append(tree.words(new))
        return self._cache._step(self._cache.in_use, self._cache.length, positions, words)

    def append(self, part: Part, ids: npt.NDArray[np.int64]) -> Lengths:
        """Note that a step of a call of ids [B, T] has run; return the rows that are in use then, int64 [B]."""
        for row, tree, real in zip(ids[:, part.start :], self._trees, part.real.tolist(), strict=True):
            tree.ran(tree.waiting[:real], row[:real].tolist())
        return self._cache.in_use
