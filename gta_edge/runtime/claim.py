"""The right to a session's cache: who has it learns from an error when something else used the session meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.token_tree import TokenTree
from gta_edge.support.exclusive import Exclusive

__all__ = ["Claim"]

Logits = npt.NDArray[np.float32]
Trees = TokenTree | Sequence[TokenTree] | None


class _Session(Protocol):
    """What a claim asks of the session that it is of; each is a method of the session's, of a claim or of anybody."""

    _calls: Exclusive
    _owner: Claim | None

    def _room(self, row: int) -> int: ...

    def _check_owner(self, owner: Claim | None) -> None: ...

    def _forward(self, ids: Any, lengths: Any, all_logits: bool, owner: Claim | None, tree: Trees = None) -> Logits: ...

    def _opened_tree(self, sequence: int, owner: Claim | None) -> TokenTree: ...

    def _truncate(self, length: Any, owner: Claim | None) -> None: ...

    def _export(self, row: int, tokens: int | None, owner: Claim | None) -> SavedCache: ...

    def _copy(self, source: int, targets: Sequence[int], owner: Claim | None) -> None: ...

    def _import(self, saved: SavedCache, row: int, tokens: int | None, owner: Claim | None) -> None: ...

    def _empty(self, owner: Claim | None) -> None: ...


class Claim:
    """The right to a session's cache, from ``Session.claim`` until something else changes the cache.

    Its methods are the session's, on the cache as this claim left it; once something else called one of those, they
    raise an InputError that says what happened, and change nothing.
    """

    def __init__(self, session: _Session) -> None:
        self._session = session

    @property
    def holds(self) -> bool:
        """Whether the cache is still as this claim left it."""
        return self._session._owner is self

    def room(self, row: int) -> int:
        """Return how many tokens one row of the batch can take in one step, padding of rows beside it included."""
        return self._session._room(row)

    def forward(
        self,
        ids: Any,
        *,
        lengths: Any = None,
        all_logits: bool = False,
        tree: Trees = None,
    ) -> Logits:
        """Append tokens, or run the new nodes of trees; see ``Session.forward``."""
        with self._session._calls.held():
            return self._session._forward(ids, lengths, all_logits, self, tree)

    def tree(self, sequence: int = 0) -> TokenTree:
        """Open a tree of tokens, which is of this claim and lasts no longer; see ``Session.tree``."""
        with self._session._calls.held():
            return self._session._opened_tree(sequence, self)

    def accept(self, tree: TokenTree, node: int, *, close: bool = False) -> None:
        """Make the path to a node of a tree of this claim part of the text; see ``TokenTree.accept``."""
        tree.accept(node, close=close)

    def truncate(self, length: Any) -> None:
        """Forget all but the first tokens; see ``Session.truncate``."""
        with self._session._calls.held():
            self._session._truncate(length, self)

    def export_cache(self, row: int = 0, tokens: int | None = None) -> SavedCache:
        """Return a copy of one sequence's cache; see ``Session.export_cache``."""
        with self._session._calls.held():
            return self._session._export(row, tokens, self)

    def import_cache(self, saved: SavedCache, row: int = 0, tokens: int | None = None) -> None:
        """Put a sequence into the cache; see ``Session.import_cache``."""
        with self._session._calls.held():
            self._session._import(saved, row, tokens, self)

    def copy_cache(self, source: int, targets: Sequence[int]) -> None:
        """Put what one row holds into others; see ``Session.copy_cache``."""
        with self._session._calls.held():
            self._session._copy(source, targets, self)

    def reset(self) -> None:
        """Empty the cache; see ``Session.reset``."""
        with self._session._calls.held():
            self._session._check_owner(self)
            self._session._empty(self)
