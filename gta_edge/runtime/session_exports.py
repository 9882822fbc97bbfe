"""Sequences taken out of a session's cache, and put into it: into another row, session or process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.model.kv_cache import TREES
from gta_edge.runtime.cache_state import CacheState
from gta_edge.runtime.claim import Claim
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session_backend import SessionBackend
from gta_edge.support.arguments import whole_argument
from gta_edge.support.exclusive import Exclusive
from gta_edge.support.text import brief

__all__ = ["SessionExports"]


class SessionExports(SessionBackend):
    """The part of every ``Session`` that exports and imports its cache, one sequence at a time."""

    reads_rows: bool = False
    """Whether the backend has ``_read_row`` and ``_write_row``."""

    copies_rows: bool = False
    """Whether the backend has ``_copy_row``, and so ``copy_cache`` works, with any cache and policy."""

    _cache: CacheState
    _calls: Exclusive
    _closed: bool

    @abstractmethod
    def _check_owner(self, owner: Claim | None) -> None:
        """Raise unless the cache is as this claim left it; None is anybody, who takes it as it is."""

    @abstractmethod
    def _changed(self, owner: Claim | None, call: str) -> None:
        """Note who changed the cache, and for claims that end with it, how."""

    @property
    def exports_cache(self) -> bool:
        """Whether ``export_cache`` and ``import_cache`` work: on this backend, and without a cache policy."""
        return self.reads_rows and self._cache.features in (None, TREES)

    def reusable(self, held: int, tokens: int) -> int:
        """Return how many of a sequence's first ``tokens`` can be kept as if no more than those had been run.

        All of them, but for a cache in blocks of 4 bits: of a block that was quantised since, they would be rounded
        twice, and so it is left out.

        Args:
            held: tokens of the sequence that there are, in the cache or exported.
            tokens: those of them that are wanted.
        """
        return self._cache.reusable(held, tokens)

    def require_exports(self) -> None:
        """Raise unless ``exports_cache``.

        Raises:
            BackendError: the backend cannot.
            InputError: a policy manages the cache.
        """
        if not self.reads_rows:
            raise BackendError(f"the backend {self.backend} cannot export its cache", "take another backend")
        if self._cache.features not in (None, TREES):
            raise InputError("a cache that a policy manages cannot be exported", "load without a cache policy")

    def export_cache(self, row: int = 0, tokens: int | None = None) -> SavedCache:
        """Return a copy of what the cache holds of one sequence, in the host's memory.

        Args:
            row: of the batch.
            tokens: only so many, the first; all by default.

        Raises:
            InputError: no such row, no or not so many tokens in it, or a policy manages the cache.
            BackendError: the backend cannot.
        """
        with self._calls.held():
            return self._export(row, tokens, None)

    def import_cache(self, saved: SavedCache, row: int = 0, tokens: int | None = None) -> None:
        """Put a sequence in place of what a row of the batch holds, as if its tokens had been run here.

        The bits are those that ``export_cache`` found, so what follows is what would have followed there: on the same
        bundle, backend and types. Where writing it fails, the cache is emptied.

        Args:
            saved: what a session of the same model exported.
            row: of the batch.
            tokens: only so many, the first; all by default.

        Raises:
            InputError: no such row, the tensors are not those of this session's cache, or a policy manages the cache.
            CapacityError: it holds more tokens than the cache can, or there is no memory for them.
            BackendError: the backend cannot.
        """
        with self._calls.held():
            self._import(saved, row, tokens, None)

    def copy_cache(self, source: int, targets: Sequence[int]) -> None:
        """Put what one row of the batch holds into others, in place of what they hold, as if it had been run there.

        What follows is to the bit what would follow in the row itself: every type of cache, and what a policy knows of
        its rows, is copied as it is, without a way over the host where the backend has one. Where copying fails, the
        cache is emptied.

        Args:
            source: row of the batch; nodes of its tree are not copied.
            targets: rows of the batch, others than that.

        Raises:
            InputError: no such row, the row itself among those to copy to, or no tokens in it.
            BackendError: the backend cannot.
        """
        with self._calls.held():
            self._copy(source, targets, None)

    # --- how -----------------------------------------------------------------------------------------------------

    def _export(self, row: int, tokens: int | None, owner: Claim | None) -> SavedCache:
        row = self._checked_row(row, owner)
        there = int(self._cache.length[row])
        count = there if tokens is None else whole_argument(tokens, "tokens")
        if not 0 < count <= there:
            raise InputError(
                f"{count} tokens of row {row} were asked for", f"expected 1 to the {there} that the cache holds of it"
            )
        arrays = self._cache.cut(self._read_row(row, count), there, count)
        return SavedCache(count, self._cache.dtype, arrays)

    def _import(self, saved: SavedCache, row: int, tokens: int | None, owner: Claim | None) -> None:
        row = self._checked_row(row, owner)
        if not isinstance(saved, SavedCache):
            raise InputError(f"the saved cache is {brief(saved)}", "expected what export_cache() returned")
        cache, count = self._cache, saved.length if tokens is None else whole_argument(tokens, "tokens")
        arrays = cache.cut(saved.checked(cache.tensors, cache.dtype, count), saved.length, count)
        if count > cache.max_length:
            raise CapacityError(
                f"the saved cache has {count} tokens, and the session has room for {cache.max_length}",
                "take back fewer of them",
            )
        cache.check_memory(cache.batch, count, 1, 0)
        self._changed(None, "an import_cache() that failed")
        cache.reserve(cache.batch, count, self._resize)
        with self._replacing_rows():
            self._write_row(row, count, arrays)
            cache.put(row, count)
        self._changed(owner, "import_cache()")

    def _copy(self, source: int, targets: Sequence[int], owner: Claim | None) -> None:
        if self._closed:
            raise BackendError("the session is closed", "load the bundle again")
        self._check_owner(owner)
        if not self.copies_rows:
            raise BackendError(f"the backend {self.backend} copies no rows of a batch", "take another backend")
        cache, source = self._cache, self._row(source)
        if not isinstance(targets, Iterable):
            raise InputError(f"rows to copy to are {brief(targets)}", "expected a list of their numbers")
        targets = sorted({self._row(target) for target in targets})
        if source in targets:
            raise InputError(f"row {source} would be copied to itself", "give other rows to copy it to")
        if not cache.length[source]:
            raise InputError(f"row {source} of the cache holds no tokens", "run some first")
        if targets:
            self._changed(None, "a copy_cache() that failed")
            with self._replacing_rows():
                self._copy_row(source, targets, cache.rows[:, source].tolist())
                cache.copy(source, targets)
            self._changed(owner, "copy_cache()")

    @contextmanager
    def _replacing_rows(self) -> Iterator[None]:
        """Replace what rows hold within this; the cache is emptied where that fails."""
        try:
            yield
        except BaseException:  # they may hold part of the one and part of the other
            self._cache.reset()
            raise

    def _checked_row(self, row: int, owner: Claim | None) -> int:
        """Return a row of the batch that can be read and written; raise unless it can."""
        if self._closed:
            raise BackendError("the session is closed", "load the bundle again")
        self._check_owner(owner)
        self.require_exports()
        return self._row(row)

    def _row(self, given: object) -> int:
        row = whole_argument(given, "the row")
        if not 0 <= row < self._cache.batch:
            raise InputError(f"the cache has no row {row}", f"expected 0 to {self._cache.batch - 1}")
        return row
