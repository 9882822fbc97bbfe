"""Which token of a tree is in which row of the cache, what each new one sees, and how rows move.

The tree lies flat in the rows behind the sequence's text, its prefix: a row for each token, in the order in which they
ran. Which of them a new token sees, those that lead to it, is a bit in a word for each row (``branches`` of the
attention op); rows of the prefix are seen by all. Its position follows from its depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["PREFIX", "Pairs", "TreeRows", "routed"]

PREFIX = -1
"""The parent of tokens that come right behind what the cache holds."""

_HOLE = -1
_MAX_HOLES = 16
"""Rows without a token that are left where they are, beside an eighth of the tree's rows."""

Words = npt.NDArray[np.int64]
Pairs = list[tuple[int, int]]
"""Rows to copy, each source and target."""


@dataclass(slots=True)
class _Node:
    parent: int
    position: int
    row: int = _HOLE  # of the cache; none before it has run
    token: int = -1
    children: set[int] = field(default_factory=set)


class TreeRows:
    """Which node of a tree is in which row of the cache.

    Args:
        start: tokens of the prefix, which are as many rows.

    Attributes:
        start: likewise, as paths are accepted.
        nodes: by number, those that have run and those that have not.
        waiting: numbers of those that have not run, in order.
        at: the node in each row behind the prefix, or -1.
        next: number of the next node.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.nodes: dict[int, _Node] = {}
        self.waiting: list[int] = []
        self.at: list[int] = []
        self.next = 0
        self._paths: dict[int, npt.NDArray[np.int64]] = {}  # rows that lead to a node, itself included; of some

    @property
    def rows(self) -> int:
        """Rows in use behind the prefix, holes among them."""
        return len(self.at)

    def grow(self, parents: Iterable[int]) -> list[int]:
        """Add nodes that have not run; return their numbers."""
        made = []
        for parent in parents:
            position = self.start if parent == PREFIX else self.nodes[parent].position + 1
            self.nodes[self.next] = _Node(parent, position)
            if parent != PREFIX:
                self.nodes[parent].children.add(self.next)
            made.append(self.next)
            self.next += 1
        self.waiting += made
        return made

    def path(self, node: int) -> list[int]:
        """Return the nodes from the prefix to a node, itself included."""
        found = []
        while node != PREFIX:
            found.append(node)
            node = self.nodes[node].parent
        return found[::-1]

    def below(self, nodes: Iterable[int]) -> list[int]:
        """Return nodes and all that descend from them, each once."""
        found: dict[int, None] = dict.fromkeys(nodes)
        pending = list(found)
        while pending:
            new = self.nodes[pending.pop()].children - found.keys()
            found |= dict.fromkeys(new)
            pending += new
        return list(found)

    def remove(self, nodes: Iterable[int]) -> None:
        """Remove nodes, with which all must go that descend from them; rows behind the last that is left are free."""
        gone = set(nodes)
        for number in gone:
            node = self.nodes.pop(number)
            if node.parent in self.nodes:
                self.nodes[node.parent].children.discard(number)
            if node.row != _HOLE:
                self.at[node.row - self.start] = _HOLE
            self._paths.pop(number, None)
        self.waiting = [number for number in self.waiting if number not in gone]
        while self.at and self.at[-1] == _HOLE:
            self.at.pop()

    # --- a step ----------------------------------------------------------------------------------------------------

    def words(self, new: Sequence[int]) -> Words:
        """Return a word for each row behind the prefix and for each of up to 64 new nodes in rows behind those."""
        first = self.start + self.rows
        paths: dict[int, npt.NDArray[np.int64]] = {}
        for i, number in enumerate(new):
            parent = self.nodes[number].parent
            before = paths[parent] if parent in paths else self._rows_to(parent)
            paths[number] = np.append(before, first + i)
        words = np.zeros(self.rows + len(new), np.uint64)
        if new:
            bits = np.repeat(np.uint64(1) << np.arange(len(new), dtype=np.uint64), [len(paths[n]) for n in new])
            np.bitwise_or.at(words, np.concatenate([paths[n] for n in new]) - self.start, bits)
        self._paths = paths
        return words.view(np.int64)

    def _rows_to(self, node: int) -> npt.NDArray[np.int64]:
        if node in self._paths:
            return self._paths[node]
        return np.array([self.nodes[number].row for number in self.path(node)], np.int64)

    def ran(self, new: Sequence[int], tokens: Sequence[int]) -> None:
        """Note that nodes have run, the first of those that wait, in the rows behind the others."""
        for number, token in zip(new, tokens, strict=True):
            node = self.nodes[number]
            node.row, node.token = self.start + self.rows, token
            self.at.append(number)
        del self.waiting[: len(new)]

    def back_to(self, rows: int) -> None:
        """Take back all that wait, and all that ran since there were so many rows behind the prefix."""
        self.remove([*self.waiting, *(number for number in self.at[rows:] if number != _HOLE)])

    # --- rows move -------------------------------------------------------------------------------------------------

    def accepted(self, node: int) -> Pairs:
        """Make the path to a node part of the prefix; what descends from it stays, all others go. Return the moves."""
        path = self.path(node)
        staying = set(self.below([node]))
        sources = {number: self.nodes[number].row for number in staying.union(path)}
        self.remove([number for number in self.nodes if number not in sources])
        first = self.start
        self.start += len(path)
        pairs = [(sources[number], first + i) for i, number in enumerate(path)]
        for child in self.nodes[node].children:
            self.nodes[child].parent = PREFIX
        for number in path:
            staying.discard(number)
            del self.nodes[number]
        return pairs + self._closed_up(staying)

    def closed_up(self) -> Pairs:
        """Move the last rows into holes, where those are many; return the moves."""
        live = [number for number in self.at if number != _HOLE]
        if self.rows - len(live) <= max(_MAX_HOLES, self.rows // 8):
            return []
        return self._closed_up(live)

    def _closed_up(self, live: Iterable[int]) -> Pairs:
        """Give nodes the first rows behind the prefix, most of them where they are; return the moves."""
        order = sorted(live, key=lambda number: self.nodes[number].row)
        end = self.start + len(order)
        at = [_HOLE] * len(order)
        moving = []
        for number in order:
            row = self.nodes[number].row
            if self.start <= row < end:
                at[row - self.start] = number
            else:
                moving.append(number)
        holes = (i for i, number in enumerate(at) if number == _HOLE)
        pairs = []
        for number, hole in zip(moving, list(holes), strict=True):
            pairs.append((self.nodes[number].row, self.start + hole))
            self.nodes[number].row = self.start + hole
            at[hole] = number
        self.at = at
        self._paths = {}
        return pairs


def routed(pairs: Pairs, free: Sequence[int]) -> list[Pairs]:
    """Return copies of rows one set after the other, in none of which a target is a source, that do all of ``pairs``.

    Args:
        pairs: source and target rows, the sources' contents as they are before all of them; no target occurs twice.
        free: rows of no value, at least one where rows change places; no source or target is among them.
    """
    waiting = {target: source for source, target in pairs if source != target}
    found = []
    while waiting:
        sources = set(waiting.values())
        now = [(source, target) for target, source in waiting.items() if target not in sources]
        for _, target in now:
            del waiting[target]
        spare = [row for row in free if row not in sources]
        aside = dict(zip(sources & waiting.keys(), spare, strict=False))  # they stand in another's way
        found.append(now + list(aside.items()))
        waiting = {target: aside.get(source, source) for target, source in waiting.items()}
    return found
