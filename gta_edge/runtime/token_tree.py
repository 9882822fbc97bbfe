"""Trees of tokens over one sequence of a cache: several continuations of one text that is held and read once.

The tree lies flat in the rows behind the sequence's text, its prefix: a row for each token, in the order in which they
ran. Which of them a new token sees, those that lead to it, is a bit in a word for each row (``branches`` of the
attention op, arXiv 2404.00242 and 2305.09781 have the idea); rows of the prefix are seen by all. Its position follows
from its depth. Here is which node is where, and nothing of a backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from gta_edge.runtime.session import Claim, Session

__all__ = ["PREFIX", "TokenTree", "TreeRows", "check_new_nodes", "routed"]

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
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.nodes: dict[int, _Node] = {}
        self.waiting: list[int] = []
        self.at: list[int] = []
        self._next = 0
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
            self.nodes[self._next] = _Node(parent, position)
            if parent != PREFIX:
                self.nodes[parent].children.add(self._next)
            made.append(self._next)
            self._next += 1
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
    spare = list(free)
    found = []
    while waiting:
        sources = set(waiting.values())
        now = [(source, target) for target, source in waiting.items() if target not in sources]
        for _, target in now:
            del waiting[target]
        aside = dict(zip(sources & waiting.keys(), spare, strict=False))  # they stand in another's way
        spare = spare[len(aside) :]
        found.append(now + list(aside.items()))
        waiting = {target: aside.get(source, source) for target, source in waiting.items()}
    return found


class TokenTree:
    """A tree of tokens behind the text of one sequence: continuations that share what they have in common.

    ``Session.tree`` or ``Claim.tree`` opens one. Nodes are numbers, counted up from 0 and never used twice. A node is
    grown, then run by ``forward(ids, tree=…)``, and from then on a row of the cache, until it is dropped or accepted::

        claim.forward(prompt)
        tree = claim.tree()
        a, b = tree.grow([PREFIX, PREFIX])
        (c,) = tree.grow([a])
        logits = claim.forward([[token_a, token_b, token_c]], tree=tree, all_logits=True)  # [1, 3, V]
        tree.accept(c)  # the text goes on with a and c; b is gone

    Each node sees the text and the nodes that lead to it, and nothing else: its logits are those of its path alone.
    While a tree has nodes, its sequence's text cannot be continued but by ``accept``. ``truncate``, ``reset`` and
    another ``claim`` close it.

    Attributes:
        sequence: row of the batch.
    """

    def __init__(self, session: Session, rows: TreeRows, sequence: int, owner: Claim | None) -> None:
        self.sequence = sequence
        self._session, self._rows, self._owner = session, rows, owner

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the session has let go of it."""
        return not self._session._has_tree(self.sequence, self._rows)

    @property
    def nodes(self) -> list[int]:
        """All nodes, in the order in which they were grown."""
        return sorted(self._rows.nodes)

    @property
    def leaves(self) -> list[int]:
        """Nodes that nothing descends from, likewise."""
        return [number for number in self.nodes if not self._rows.nodes[number].children]

    @property
    def new(self) -> int:
        """How many nodes have not run."""
        return len(self._rows.waiting)

    @property
    def rows(self) -> int:
        """Rows of the cache behind the text that it takes, with those of dropped nodes that are not used again yet."""
        return self._rows.rows

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._rows.nodes)

    def __contains__(self, node: object) -> bool:
        """Whether there is such a node."""
        return node in self._rows.nodes

    def path(self, node: int) -> list[int]:
        """Return the nodes from the text to a node, itself included.

        Raises:
            InputError: there is no such node.
        """
        return self._rows.path(self._known(node))

    def ids(self, node: int) -> list[int]:
        """Return the token ids of ``path(node)``.

        Raises:
            InputError: there is no such node, or it has not run.
        """
        return [self._rows.nodes[number].token for number in self._rows.path(self._run(node))]

    # --- what changes it -------------------------------------------------------------------------------------------

    def grow(self, parents: Iterable[int]) -> list[int]:
        """Add nodes that the next ``forward`` runs; return their numbers.

        Args:
            parents: of each new node: a node, which need not have run yet, or ``PREFIX``.

        Raises:
            InputError: it is closed, or there is no such node; then none is added.
        """
        with self._session._calls.held():
            self.check(self._session)
            return self._rows.grow([parent if parent == PREFIX else self._known(parent) for parent in parents])

    def accept(self, node: int) -> None:
        """Make the path to a node part of the text. What descends from the node stays, and all other nodes go.

        Rows that are not in place are moved: those of a path that was grown before all others are.

        Raises:
            InputError: it is closed, something else used the session meanwhile, there is no such node, or nodes have
                not run.
            CapacityError, BackendError: rows could not be moved; the cache was emptied.
        """
        with self._session._calls.held():
            self.check(self._session)
            self._session._accept(self, self._run(node), self._owner)

    def drop(self, nodes: Iterable[int]) -> None:
        """Drop nodes and all that descend from them; their rows are used again.

        Raises:
            InputError: it is closed, or there is no such node; then none is dropped.
        """
        with self._session._calls.held():
            self.check(self._session)
            self._rows.remove(self._rows.below([self._known(node) for node in nodes]))

    def prune(self, leaves: Iterable[int]) -> None:
        """Drop leaves, and of the nodes that lead to them those that nothing else descends from: whole branches.

        Raises:
            InputError: it is closed, or a node is no leaf; then none is dropped.
        """
        with self._session._calls.held():
            self.check(self._session)
            nodes = self._rows.nodes
            ended = [self._known(node) for node in leaves]
            for node in ended:
                if nodes[node].children:
                    raise InputError(
                        f"node {node} of the tree is no leaf", "drop() takes nodes with what descends from them"
                    )
            for node in ended:
                while node in nodes and not nodes[node].children:
                    parent = nodes[node].parent
                    self._rows.remove([node])
                    node = parent

    def close(self) -> None:
        """Drop all nodes, so that the text can be continued without it."""
        with self._session._calls.held():
            if not self.closed:
                self._rows.remove(list(self._rows.nodes))

    # --- how -------------------------------------------------------------------------------------------------------

    def check(self, session: Session) -> None:
        """Refuse a tree that is closed, of another session, or of a claim that has ended."""
        if session is not self._session:
            raise InputError("the tree is of another session", "open one with this session's tree()")
        session._check_owner(self._owner)
        if self.closed:
            raise InputError(
                "the tree is closed: the session was truncated, reset or claimed, or another tree opened",
                "open another",
            )

    def _known(self, node: Any) -> int:
        if isinstance(node, bool) or not isinstance(node, Integral) or int(node) not in self._rows.nodes:
            raise InputError(f"{brief(node)} is no node of the tree", "expected the number of one that is there")
        return int(node)

    def _run(self, node: Any) -> int:
        known = self._known(node)
        if self._rows.waiting:
            raise InputError(f"{self.new} nodes of the tree have not run", "run them with forward(), or drop() them")
        return known


def check_new_nodes(trees: Sequence[TokenTree], ids: npt.NDArray[np.int64]) -> None:
    """Refuse trees that are not those of all rows of ids [B, T], or have other new nodes than they say.

    Raises:
        InputError: so it is.
    """
    if [tree.sequence for tree in trees] != list(range(len(ids))):
        raise InputError(
            f"there are trees of sequences {[tree.sequence for tree in trees]} for ids of {len(ids)} rows",
            "expected a tree for each row, in order",
        )
    new = [tree.new for tree in trees]
    if max(new) != ids.shape[1]:
        raise InputError(
            f"ids are {ids.shape[1]} tokens wide and the trees have {', '.join(map(str, new))} new nodes",
            "grow() the tree by as many nodes as there are tokens",
        )
