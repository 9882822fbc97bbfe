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

from gta_edge.errors import BackendError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.cache_state import CacheState
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

    def __init__(self, config: ModelConfig, cache: CacheState | None = None) -> None:
        self.config = config
        # for text in and out; who loads a bundle sets them from its files
        self.tokenizer: Tokenizer | None = None
        self.end_token_ids: frozenset[int] = frozenset(config.eos_token_ids)
        self.chat_end_token_ids: frozenset[int] = frozenset()  # besides those
        self.chat_sampling: Mapping[str, float] = {}  # options of ``generate`` where a chat leaves them open
        self.skipped: dict[str, str] = {}  # by name, why ``auto`` passed over a backend that is there
        self._cache = cache or CacheState(config)
        self._closed = False
        self._calls = Exclusive("the session", "load the bundle once for each thread, or let them take turns")
        self._owner: Claim | None = None  # the claim that the cache is of; None after anybody else changed it
        self._changed_by = "nothing"

    # --- what a backend adds -----------------------------------------------------------------------------------

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

    def claim(self) -> Claim:
        """Empty the cache and return the right to it, which lasts until something else changes it."""
        claim = Claim(self)
        with self._calls.held():
            self._empty(claim)
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
            lengths: integers [B], 1 to T: how many tokens of each row are real; all by default.
            all_logits: give logits for every position instead of each row's last real one.

        Returns:
            float32 [B, V], or [B, T, V] with ``all_logits``, where padded positions are zero.

        Raises:
            InputError: ids that are no integers, of another shape or outside the vocabulary; lengths outside 1 to T;
                another number of rows than the cache holds.
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
        parts = cache.plan(past, counts, tokens, 4 * math.prod(shape))

        # where one step gives all logits, as for every token of a generation, they are handed on and not copied
        at_once = len(parts) == 1 or (not all_logits and bool((counts == counts[0]).all()))
        logits: Logits = np.empty(0 if at_once else shape, np.float32)
        self._changed(None, "a forward() that failed")  # what it leaves is nobody's
        for part in parts:
            real, ends_here = part.real, part.ends_here
            if all_logits:
                positions = np.broadcast_to(np.arange(part.width), (batch, part.width))
            else:
                positions = np.maximum(real - 1, 0)[:, None] if ends_here.any() else np.zeros((batch, 0), np.int64)
            cache.reserve(batch, int(past.max()) + part.width, self._resize)
            managed = cache.prepare(part, self)
            given = ids[:, part.start : part.stop], past, np.ascontiguousarray(positions, np.int64)
            found = self._run(*given) if managed is None else self._run(*given, managed)
            if all_logits:
                found[positions >= real[:, None]] = 0
            if at_once:
                if all_logits or found.shape[1]:
                    logits = found if all_logits else found[:, 0]
            elif all_logits:
                logits[:, part.start : part.stop] = found
            elif found.shape[1]:
                logits[ends_here] = found[ends_here, 0]
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
        if (array < 1).any() or (array > tokens).any():
            raise InputError(f"lengths are {array.tolist()}", f"expected 1 to {tokens}, the width of the ids")
        return array.astype(np.int64)


class Claim:
    """The right to a session's cache, from ``Session.claim`` until something else changes the cache.

    Its methods are the session's, on the cache as this claim left it; once something else called one of those, they
    raise an InputError that says what happened, and change nothing.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def forward(self, ids: Any, *, lengths: Any = None, all_logits: bool = False) -> Logits:
        """Append tokens; see ``Session.forward``."""
        with self._session._calls.held():
            return self._session._forward(ids, lengths, all_logits, self)

    def truncate(self, length: Any) -> None:
        """Forget all but the first tokens; see ``Session.truncate``."""
        with self._session._calls.held():
            self._session._truncate(length, self)

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
