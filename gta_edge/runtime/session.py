"""The one shape of every backend: a session holds a model and its cache, and appends tokens to it.

What is the same everywhere lives here, in ``Session``: checking ids, prompts in chunks, rows of different length, and
whose the cache is. What the cache holds and when it grows is in its state (``cache_state``). A backend adds only how
memory is held (``_resize``) and how one chunk is run (``_run``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.cache_state import CacheState
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.step_costs import StepCosts
from gta_edge.support.exclusive import Exclusive

if TYPE_CHECKING:
    from typing_extensions import Self

    from gta_edge.formats.tokenizer import Tokenizer

__all__ = ["Claim", "Session"]

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Session(ABC):
    """A model with a cache, ready to take tokens. Use it as a context manager, or call ``close``.

    Args:
        config: the model's sizes.
        cache: what the cache holds and when it grows; float32 on a device, growing in steps, by default.

    Rows of a batch may differ in length; the first ``forward`` on an empty cache sets their number.

    There is one cache, and so one text at a time. What needs the cache to stay as it left it (a generation, an
    evaluation) takes a ``claim``, and learns from an error when something else used the session meanwhile. Two threads
    never run at once: the second call is an InputError, but ``close`` waits.
    """

    backend: str
    """Name of the backend, as ``--backend`` takes it."""

    rounds_activations: bool = False
    """Whether matmuls round activations to int8; the option ``exact`` of such a backend turns it off."""

    compute: str = "fp32"
    """Type of activations and cache: ``fp32``, ``fp16`` or ``bf16``."""

    device: str = "cpu"
    """What the model runs on: ``cpu`` or ``gpu``."""

    weights_as_stored: bool = True
    """Whether quantised weights stay so in memory; otherwise they were dequantised when they were loaded."""

    reads_rows: bool = False
    """Whether the backend has ``_read_row`` and ``_write_row``."""

    def __init__(self, config: ModelConfig, cache: CacheState | None = None) -> None:
        self.config = config
        # for text in and out; who loads a bundle sets them from its files
        self.tokenizer: Tokenizer | None = None
        self.end_token_ids: frozenset[int] = frozenset(config.eos_token_ids)
        self.chat_end_token_ids: frozenset[int] = frozenset()  # besides those
        self.chat_sampling: Mapping[str, float] = {}  # options of ``generate`` where a chat leaves them open
        self.skipped: dict[str, str] = {}  # by name, why ``auto`` passed over a backend that is there
        self.step_costs = StepCosts()  # of calls that continue a text, as speculation measures them
        self._cache = cache or CacheState(config)
        self._closed = False
        self._calls = Exclusive("the session", "load the bundle once for each thread, or let them take turns")
        self._first_row = 0  # of the batch, that a step computes
        self._owner: Claim | None = None  # the claim that the cache is of; None after anybody else changed it
        self._changed_by = "nothing"

    # --- what a backend adds -----------------------------------------------------------------------------------

    def _rows_of_step(self, first: int, stop: int, tokens: int) -> slice:
        """Return the rows of the batch that a step computes where only rows ``first`` to ``stop - 1`` take tokens.

        All of them here. A backend that can run a part of the batch returns fewer; ``_run`` then gets as many, and
        ``_first_row`` says which of the batch their first one is.

        Args:
            first: the first row that takes tokens.
            stop: the row behind the last.
            tokens: T of the step.
        """
        return slice(None)

    @abstractmethod
    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        """Make room for ``[batch, n, capacities[i], d]`` in layer i, keeping what is there while the batch is the same.

        New memory must hold finite values: rows beyond a length are weighted with zero, not skipped.
        """

    @abstractmethod
    def _run(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None = None
    ) -> Logits:
        """Append ``input_ids`` [B, T] and return logits [B, M, V]; there is room for them.

        The array is the caller's, who writes into it: no view of what a later step overwrites.

        Args:
            input_ids: int64 [B, T].
            past_length: int64 [B], tokens in the cache.
            logit_positions: int64 [B, M].
            managed: inputs of a managed cache, whose ``past_length`` counts; None of a session without a policy.
        """

    # Not abstract: a backend that takes no cache policy has nothing to do in these, and is never asked. The errors are
    # for a subclass that is given a ManagedCache and leaves one out.

    def _move(self, moves: Moves) -> None:
        """Fold and copy rows of the cache, of every tensor of their layers; see ``Moves``."""
        raise NotImplementedError(f"{self.backend} manages no cache")

    def _received(self) -> list[npt.NDArray[np.float32]]:
        """Return what each layer's rows received, float32 [B, S] per layer, in the host's memory; only to be read."""
        raise NotImplementedError(f"{self.backend} manages no cache")

    def _rotate(self, shifts: Sequence[Ids]) -> None:
        """Rotate keys as if their tokens' positions were larger by ``shifts[i]``, int64 [B, S], in layer i."""
        raise NotImplementedError(f"{self.backend} manages no cache")

    def _read_row(self, row: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        """Return the first tokens of a row of the batch: by ``CacheTensor.name`` an array of its own in host memory.

        Each has the extents ``CacheTensor.shape(1, tokens)``.
        """
        raise NotImplementedError(f"{self.backend} exports no cache")

    def _write_row(self, row: int, tokens: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put what ``_read_row`` returned in its place in a row of the batch, for which there is room."""
        raise NotImplementedError(f"{self.backend} exports no cache")

    def _reopen(self, sequence: int, block: int) -> None:
        """Put what the codes of a block stand for into a sequence's open block, in every layer; see ``BlockCache``."""
        raise NotImplementedError(f"{self.backend} has no cache in blocks")

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes that the cache occupies now, over all layers."""

    @property
    def cuda_graph(self) -> bool | None:
        """Whether single tokens are replays of a CUDA graph; None where there is none or before the first token."""
        return None

    def _release(self) -> None:  # noqa: B027  a backend may have nothing to free
        """Free what the session holds; called once."""

    # --- what everyone uses ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free what the session holds; it cannot run afterwards. A step that another thread runs is waited for."""
        with self._calls.held(wait=True):
            if not self._closed:
                self._closed = True
                self._release()

    def claim(self, batch: int | None = None) -> Claim:
        """Empty the cache and return the right to it, which lasts until something else changes it.

        Args:
            batch: rows that the cache is to have from now on; by default the first ``forward`` says how many.

        Raises:
            CapacityError: there is no memory for so many.
        """
        claim = Claim(self)
        with self._calls.held():
            self._empty(claim)
            if batch is not None and batch != self._cache.batch:
                self._cache.check_memory(batch, 1, 1, 0)
                self._cache.reserve(batch, 1, self._resize)
        return claim

    @property
    def length(self) -> Ids:
        """Tokens in the cache, int64 [B], per row (a copy)."""
        return self._cache.length.copy()

    @property
    def rows(self) -> Ids:
        """Rows of memory in use, int64 [L, B], per layer and row of the batch (a copy).

        Without a policy that evicts, every token has one: then they are ``length`` in each layer.
        """
        return self._cache.rows.copy()

    @property
    def capacity(self) -> int:
        """Tokens per row that the cache has memory for now."""
        return self._cache.capacity

    def revocable(self) -> int | None:
        """Return how many tokens beyond its first the next call may take for ``truncate`` to undo them entirely.

        None is any number. As many at most may a call guess that is to leave what token after token would.

        Raises:
            InputError: a policy manages the cache that would count what was taken back.
        """
        return self._cache.revocable()

    @property
    def cache_dtype(self) -> str:
        """Type of cached values: that of ``compute``, or ``int8`` or ``fp8``."""
        return self._cache.dtype

    @property
    def max_length(self) -> int:
        """Tokens per row at most: those that the model has positions for (P), or that an engine was built for."""
        return self._cache.max_length

    @property
    def chunk_size(self) -> int:
        """Tokens of a prompt that are run at once, per row."""
        return self._cache.chunk_size

    def forward(self, ids: Any, *, lengths: Any = None, all_logits: bool = False) -> Logits:
        """Append tokens to the cache and return logits.

        Args:
            ids: integers [B, T]; with ``lengths`` the rows are right-padded to T (padding must be valid ids too).
            lengths: integers [B], 0 to T: how many tokens of each row are real; all by default. A row without any
                stays as it is; rows before the first and behind the last that has some need not be computed.
            all_logits: give logits for every position instead of each row's last real one.

        Returns:
            float32 [B, V], or [B, T, V] with ``all_logits``, where padded positions are zero. Those of a row without
            tokens are zero too.

        Raises:
            InputError: ids that are no integers, of another shape or outside the vocabulary; lengths outside 0 to T,
                or all 0; another number of rows than the cache holds.
            CapacityError: a row, padding included, would pass the model's last position, or there is not as much memory
                as it would take. The cache is unchanged.
            BackendError: the session is closed, or the backend failed.
        """
        with self._calls.held():
            return self._forward(ids, lengths, all_logits, None)

    def truncate(self, length: Any) -> None:
        """Forget all but the first ``length`` tokens of the cache: one number, or one per row.

        Raises:
            InputError: a length below 0 or above what the row holds.
        """
        with self._calls.held():
            self._truncate(length, None)

    def reset(self) -> None:
        """Empty the cache; its memory stays for the next prompt."""
        with self._calls.held():
            self._empty(None)

    @property
    def exports_cache(self) -> bool:
        """Whether ``export_cache`` and ``import_cache`` work: on this backend, and without a cache policy."""
        return self.reads_rows and self._cache.features is None

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
        bundle, backend and types.

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- how -----------------------------------------------------------------------------------------------------

    def _check_owner(self, owner: Claim | None) -> None:
        """Raise unless the cache is as this claim left it; None is anybody, who takes it as it is."""
        if owner is not None and owner is not self._owner and not self._closed:
            raise InputError(
                f"the session is no longer as it was left, something else used it: {self._changed_by}",
                "finish one generation or evaluation before the next, or load the bundle once for each",
            )

    def _changed(self, owner: Claim | None, call: str) -> None:
        """Note who changed the cache, and for claims that end with it, how."""
        self._owner = owner
        self._changed_by = f"{call} was called on it" if owner is None else "another generation or evaluation began"

    def _empty(self, owner: Claim | None) -> None:
        self._cache.reset()
        self._changed(owner, "reset()")

    def _forward(self, ids: Any, lengths: Any, all_logits: bool, owner: Claim | None) -> Logits:
        """``forward``, of a claim or of anybody."""
        if self._closed:
            raise BackendError("the session is closed", "load the bundle again")
        self._check_owner(owner)
        ids = self._check_ids(ids)
        batch, tokens = ids.shape
        counts = self._check_lengths(lengths, batch, tokens)
        cache = self._cache
        past = cache.past_for(batch)
        shape = (batch, tokens, self.config.vocab_size) if all_logits else (batch, self.config.vocab_size)
        parts = cache.plan(past, counts, tokens, 4 * math.prod(shape), self._rows_of_step)

        # where one step gives all logits, as for every token of a generation, they are handed on and not copied
        at_once = len(parts) == 1 or (not all_logits and bool((counts == counts[0]).all()))
        at_once = at_once and bool(counts.all())
        logits: Logits = np.zeros(0 if at_once else shape, np.float32)
        self._changed(None, "a forward() that failed")  # what it leaves is nobody's
        for part in parts:
            rows = part.rows
            real, ends_here, before = part.real[rows], part.ends_here[rows], past[rows]
            if all_logits:
                positions = np.broadcast_to(np.arange(part.width), (len(real), part.width))
            else:
                positions = np.maximum(real - 1, 0)[:, None] if ends_here.any() else np.zeros((len(real), 0), np.int64)
            cache.reserve(batch, int(before.max()) + part.width, self._resize)
            managed = cache.prepare(part, self)
            past_of = cache.past_of(part, before)
            given = ids[rows, part.start : part.stop], past_of, np.ascontiguousarray(positions, np.int64)
            self._first_row = rows.start or 0
            found = self._run(*given) if managed is None else self._run(*given, managed.of_rows(rows))
            if all_logits:
                found[positions >= real[:, None]] = 0
            if at_once:
                if all_logits or found.shape[1]:
                    logits = found if all_logits else found[:, 0]
            elif all_logits:
                logits[rows, part.start : part.stop] = found
            elif found.shape[1]:
                logits[rows][ends_here] = found[ends_here, 0]
            past = cache.append(part, self)
        self._changed(owner, "forward()")
        return logits

    def _truncate(self, length: Any, owner: Claim | None) -> None:
        self._check_owner(owner)
        try:
            self._cache.truncate(_as_array(length, "a length for truncate"), length, self)
        except InputError:  # nothing has changed
            raise
        except BaseException:
            self._changed(None, "a truncate() that failed")
            raise
        self._changed(owner, "truncate()")

    def _export(self, row: int, tokens: int | None, owner: Claim | None) -> SavedCache:
        self._check_exports(row, owner)
        there = int(self._cache.length[row])
        count = there if tokens is None else tokens
        if not 0 < count <= there:
            raise InputError(
                f"{count} tokens of row {row} were asked for", f"expected 1 to the {there} that the cache holds of it"
            )
        arrays = self._cache.cut(self._read_row(row, count), there, count)
        return SavedCache(count, self.cache_dtype, arrays)

    def _import(self, saved: SavedCache, row: int, tokens: int | None, owner: Claim | None) -> None:
        self._check_exports(row, owner)
        cache, count = self._cache, saved.length if tokens is None else tokens
        arrays = cache.cut(saved.checked(cache.tensors, self.cache_dtype, count), saved.length, count)
        if count > self.max_length:
            raise CapacityError(
                f"the saved cache has {count} tokens, and the session has room for {self.max_length}",
                "take back fewer of them",
            )
        cache.check_memory(cache.batch, count, 1, 0)
        self._changed(None, "an import_cache() that failed")
        cache.reserve(cache.batch, count, self._resize)
        self._write_row(row, count, arrays)
        cache.put(row, count)
        self._changed(owner, "import_cache()")

    def _check_exports(self, row: int, owner: Claim | None) -> None:
        """Raise unless rows of the cache can be read and written."""
        if self._closed:
            raise BackendError("the session is closed", "load the bundle again")
        self._check_owner(owner)
        if not self.reads_rows:
            raise BackendError(f"the backend {self.backend} cannot export its cache", "take another backend")
        if self._cache.features is not None:
            raise InputError("a cache that a policy manages cannot be exported", "load without a cache policy")
        if not 0 <= row < self._cache.batch:
            raise InputError(f"the cache has no row {row}", f"expected 0 to {self._cache.batch - 1}")

    def _check_ids(self, ids: Any) -> Ids:
        array = _as_array(ids, "ids")
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
            raise InputError(
                f"ids are {array.dtype} of shape {list(array.shape)}",
                "expected integers [B, T] with at least one token",
            )
        outside = array[(array < 0) | (array >= self.config.vocab_size)]
        if outside.size:
            raise InputError(f"token id {int(outside[0])} is outside the vocabulary: 0 to {self.config.vocab_size - 1}")
        return np.ascontiguousarray(array, np.int64)

    @staticmethod
    def _check_lengths(lengths: Any, batch: int, tokens: int) -> Ids:
        if lengths is None:
            return np.full(batch, tokens, np.int64)
        array = _as_array(lengths, "lengths")
        if array.shape != (batch,) or array.dtype.kind not in "iu":
            raise InputError(f"lengths are {lengths!r}", f"expected {batch} whole numbers, one per row")
        if (array < 0).any() or (array > tokens).any():
            raise InputError(f"lengths are {array.tolist()}", f"expected 0 to {tokens}, the width of the ids")
        if not array.any():
            raise InputError(f"lengths are {array.tolist()}", "expected at least one row with a token")
        return array.astype(np.int64)


class Claim:
    """The right to a session's cache, from ``Session.claim`` until something else changes the cache.

    Its methods are the session's, on the cache as this claim left it; once something else called one of those, they
    raise an InputError that says what happened, and change nothing.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def holds(self) -> bool:
        """Whether the cache is still as this claim left it."""
        return self._session._owner is self

    def room(self, row: int) -> int:
        """Return how many tokens one row of the batch can take in one step, padding of rows beside it included."""
        beside = self._session._rows_of_step(row, row + 1, 2)
        return self._session.max_length - int(self._session._cache.length[beside].max())

    def forward(self, ids: Any, *, lengths: Any = None, all_logits: bool = False) -> Logits:
        """Append tokens; see ``Session.forward``."""
        with self._session._calls.held():
            return self._session._forward(ids, lengths, all_logits, self)

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


def _as_array(value: Any, what: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different length
        raise InputError(f"{what}: rows differ in length", "pad them on the right and give lengths=") from error
