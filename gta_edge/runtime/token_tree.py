"""Trees of tokens over one sequence of a cache: several continuations of one text that is held and read once.

The idea is DeFT's (arXiv 2404.00242) and SpecInfer's (2305.09781). Where its tokens are is in ``tree_rows``, and what a
session makes of it in ``tree_cache``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.runtime.tree_rows import PREFIX, TreeRows
from gta_edge.support.exclusive import Exclusive
from gta_edge.support.text import brief

__all__ = ["PREFIX", "TokenTree", "check_new_nodes", "listed"]


class _Session(Protocol):
    """What a tree asks of the session that it is of."""

    _calls: Exclusive

    def _has_tree(self, sequence: int, rows: TreeRows) -> bool: ...

    def _check_owner(self, owner: Any) -> None: ...

    def _accept(self, tree: TokenTree, node: int, owner: Any) -> None: ...


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

    def __init__(self, session: _Session, rows: TreeRows, sequence: int, owner: object) -> None:
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
    def next(self) -> int:
        """The number of the node that is grown next."""
        return self._rows.next

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
            parents: of each new node: a node, which need not have run yet, or ``PREFIX``. It may be one of those that
                this call adds before it: their numbers go on from ``next``.

        Raises:
            InputError: it is closed, or there is no such node; then none is added.
        """
        with self._session._calls.held():
            self._require(self._session)
            checked: list[int] = []
            for parent in _each(parents):
                number = _number(parent)
                made = number == PREFIX or number in range(self.next, self.next + len(checked))
                checked.append(number if number is not None and made else self._known(parent))
            return self._rows.grow(checked)

    def accept(self, node: int, *, close: bool = False) -> None:
        """Make the path to a node part of the text. What descends from the node stays, and all other nodes go.

        Rows that are not in place are moved: those of a path that was grown before all others are.

        Args:
            node: that has run.
            close: drop what descends from it too, so that the text can be continued without the tree.

        Raises:
            InputError: it is closed, something else used the session meanwhile, there is no such node, or nodes have
                not run.
            CapacityError, BackendError: rows could not be moved; the cache was emptied.
        """
        with self._session._calls.held():
            self._require(self._session)
            known = self._run(node)
            if close:
                self._rows.remove(self._rows.below(self._rows.nodes[known].children))
            self._session._accept(self, known, self._owner)

    def drop(self, nodes: Iterable[int]) -> None:
        """Drop nodes and all that descend from them; their rows are used again.

        Raises:
            InputError: it is closed, or there is no such node; then none is dropped.
        """
        with self._session._calls.held():
            self._require(self._session)
            self._rows.remove(self._rows.below([self._known(node) for node in _each(nodes)]))

    def prune(self, leaves: Iterable[int]) -> None:
        """Drop leaves, and of the nodes that lead to them those that nothing else descends from: whole branches.

        Raises:
            InputError: it is closed, or a node is no leaf; then none is dropped.
        """
        with self._session._calls.held():
            self._require(self._session)
            nodes = self._rows.nodes
            ended = [self._known(node) for node in _each(leaves)]
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

    def _require(self, session: _Session) -> None:
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
        number = _number(node)
        if number is None or number not in self._rows.nodes:
            raise InputError(f"{brief(node)} is no node of the tree", "expected the number of one that is there")
        return number

    def _run(self, node: Any) -> int:
        known = self._known(node)
        if self._rows.waiting:
            raise InputError(f"{self.new} nodes of the tree have not run", "run them with forward(), or drop() them")
        return known


def _number(node: Any) -> int | None:
    """Return a whole number as an int, and None of anything else."""
    return None if isinstance(node, bool) or not isinstance(node, Integral) else int(node)


def _each(nodes: Any) -> Iterable[Any]:
    if not isinstance(nodes, Iterable):
        raise InputError(f"nodes of the tree are {brief(nodes)}", "expected a list of their numbers")
    return nodes


def listed(trees: Any) -> list[TokenTree]:
    """Return what was given as a tree or trees, as a list.

    Raises:
        InputError: it is neither.
    """
    found = list(trees) if isinstance(trees, Sequence) else [trees]
    if not all(isinstance(tree, TokenTree) for tree in found):
        raise InputError(f"tree is {brief(trees)}", "expected what the session's tree() returned, or a list of such")
    return found


def check_new_nodes(trees: Sequence[TokenTree], ids: npt.NDArray[np.int64], batch: int) -> None:
    """Refuse trees that are not those of all rows of ids [B, T], or have other new nodes than they say.

    Raises:
        InputError: so it is, or the cache holds another number of rows, ``batch``.
    """
    if len(ids) != batch:
        raise InputError(f"ids have {len(ids)} rows and the cache holds {batch}", "expected a row and a tree for each")
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
