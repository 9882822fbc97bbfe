"""The right to a session's cache: who has it learns from an error when something else used the session meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.token_tree import TokenTree

if TYPE_CHECKING:
    from gta_edge.runtime.session import Session

__all__ = ["Claim"]


class Claim:
    """The right to a session's cache, from ``Session.claim`` until something else changes the cache.

    Its methods are the session's, on the cache as this claim left it; once something else called one of those, they
    raise an InputError that says what happened, and change nothing.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def forward(
        self,
        ids: Any,
        *,
        lengths: Any = None,
        all_logits: bool = False,
        tree: TokenTree | Sequence[TokenTree] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append tokens, or run the new nodes of trees; see ``Session.forward``."""
        with self._session._calls.held():
            return self._session._forward(ids, lengths, all_logits, self, tree)

    def tree(self, sequence: int = 0) -> TokenTree:
        """Open a tree of tokens, which is of this claim and lasts no longer; see ``Session.tree``."""
        with self._session._calls.held():
            return self._session._opened_tree(sequence, self)

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

    def reset(self) -> None:
        """Empty the cache; see ``Session.reset``."""
        with self._session._calls.held():
            self._session._check_owner(self)
            self._session._empty(self)
