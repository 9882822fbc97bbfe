"""What a session's cache holds and how much room it has: the bookkeeping that is the same for every backend.

Every token stays, in the order in which it came: row t of a cache is position t. So the cache is ``length`` tokens per
row in memory for ``capacity``, and ``past_length + T <= S <= P``, which every kernel relies on, is kept here. Capacity
follows length in steps, since attention costs as it; nothing is allocated for a token in between. ``truncate`` and
``reset`` change lengths alone, and the memory stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import CapacityError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.model.kv_cache import CacheTensor, cache_bytes, cache_tensors
from gta_edge.numerics.dtypes import COMPUTE_TYPES, FLOAT_TYPES
from gta_edge.plan.cost import Execution
from gta_edge.plan.roofline import activation_bytes
from gta_edge.support.arguments import whole_argument
from gta_edge.support.memory import available_bytes

if TYPE_CHECKING:
    from gta_edge.plugins.attention.definition import Features
    from gta_edge.runtime.cache_moves import CacheMemory, ManagedStep

__all__ = ["CAPACITY_STEP", "CHUNK_SIZE", "CacheState", "Lengths", "Part"]

Lengths = npt.NDArray[np.int64]

CHUNK_SIZE = 256
"""Tokens of a prompt that are run at once: bounds the memory of activations and scores. 128 to 512 are equally fast."""

CAPACITY_STEP = 256
"""The cache grows in multiples of this many tokens, since attention costs as its capacity."""

_FEW_BYTES = 2**24
"""Logits that nobody need ask the system for."""


@dataclass(frozen=True)
class Part:
    """Tokens of one call of ``forward`` that are run at once.

    Attributes:
        start: the first of them, counted from the call's first.
        stop: behind the last.
        counts: real tokens of the whole call, int64 [B].
        chunk: start and stop of the chunk that they are of.
        rows: rows of the batch that are computed.
    """

    start: int
    stop: int
    counts: Lengths
    chunk: tuple[int, int]
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def width(self) -> int:
        """Tokens per row, padding included (T of the step)."""
        return self.stop - self.start

    @property
    def real(self) -> Lengths:
        """Tokens that count, int64 [B]."""
        return np.minimum(np.maximum(self.counts - self.start, 0), self.width)  # np.clip takes three times as long

    @property
    def left(self) -> Lengths:
        """Tokens that count from the first of these to the end of their chunk, int64 [B]."""
        left: Lengths = np.maximum(np.minimum(self.counts, self.chunk[1]) - self.start, 0)
        return left

    @property
    def ends_here(self) -> npt.NDArray[np.bool_]:
        """Rows whose last token is among them, bool [B]."""
        return (self.counts > self.start) & (self.counts <= self.stop)

    @property
    def ends_chunk(self) -> bool:
        """Whether they are the last of their chunk."""
        return self.stop == self.chunk[1]

    def split(self, start: int, stop: int) -> Part:
        """Return some of these tokens, counted from the first."""
        return Part(self.start + start, self.start + stop, self.counts, self.chunk)

    def computing(self, choose: Callable[[int, int, int], slice]) -> Part:
        """Return this part with the rows that it computes: as a session chooses, who is told the fewest that do.

        Args:
            choose: takes the first row that has tokens, the one behind the last, and the tokens per row.
        """
        takes = np.flatnonzero(self.real)
        first, stop = (int(takes[0]), int(takes[-1]) + 1) if len(takes) else (0, len(self.counts))
        return replace(self, rows=choose(first, stop, self.width))

    def at_end(self, tokens: int) -> npt.NDArray[np.bool_]:
        """Return for which rows they are among the last ``tokens`` that this chunk has of the row, bool [B]."""
        ends = np.minimum(self.counts, self.chunk[1])
        return (self.start >= ends - tokens) & (self.stop <= ends)


class CacheState:
    """The cache of one session, without its memory: how long each row is, and when there has to be more room.

    Args:
        config: the model's sizes.
        dtype: how cached values are stored, one of ``CACHES``.
        compute: type of activations; that of the cache by default, or of one that is quantised, ``fp16``.
        transposed: as ``kv_cache.cache_tensors`` has it.
        on_host: whether its memory is the host's, of which the system is asked before it is taken.
        chunk_size: largest number of tokens per row that is run at once.
        capacity_step: granularity in tokens of the cache's growth.
        max_length: tokens per row at most; the model's positions (P) by default.
        limit: what ``max_length`` comes from, for messages.

    Attributes:
        length: tokens in the cache, int64 [B], per row. It is replaced and never written to.
        capacities: tokens per row that each layer has memory for now (S).

    Raises:
        InputError: a chunk or a step below 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str = "fp32",
        *,
        compute: str | None = None,
        transposed: bool = False,
        on_host: bool = False,
        chunk_size: int = CHUNK_SIZE,
        capacity_step: int = CAPACITY_STEP,
        max_length: int | None = None,
        limit: str = "",
    ) -> None:
        for name, tokens in (("chunk_size", chunk_size), ("capacity_step", capacity_step)):
            if whole_argument(tokens, name) < 1:
                raise InputError(f"{name} is {tokens}", "expected at least 1 token")
        self.config, self.dtype = config, dtype
        self._compute, self._transposed = compute or (dtype if dtype in FLOAT_TYPES else COMPUTE_TYPES[0]), transposed
        self.chunk_size, self.capacity_step = chunk_size, capacity_step
        self.max_length = config.max_position_embeddings if max_length is None else max_length
        self.length: Lengths = np.zeros(1, np.int64)
        self.capacities = (0,) * config.num_hidden_layers
        self._on_host = on_host
        self._limit = limit or f"the model has {self.max_length} positions"
        self._unpacked = 1  # layers' caches that there are at once in that type
        self._step_size = 0  # rows times tokens of the largest chunk that there was room for

    @property
    def features(self) -> Features | None:
        """Inputs that a managed cache needs of the graph; None of a cache that holds every token."""
        return None

    @property
    def observed_tokens(self) -> int | None:
        """Tokens of a chunk, its last, whose attention alone decides which rows stay; None where all of them do."""
        return None

    @property
    def batch(self) -> int:
        """Rows that the cache holds."""
        return len(self.length)

    @property
    def rows(self) -> Lengths:
        """Rows of memory in use, int64 [L, B]: those of all tokens. Do not write to it."""
        return np.broadcast_to(self.length, (len(self.capacities), self.batch))

    @property
    def filled(self) -> int:
        """Tokens of the longest row."""
        return int(self.length.max(initial=0))

    @property
    def capacity(self) -> int:
        """Tokens per row that there is memory for now, in the layer that has most."""
        return max(self.capacities)

    @property
    def tensors(self) -> list[CacheTensor]:
        """What there has to be memory for."""
        return cache_tensors(self.config, self.dtype, compute=self._compute, transposed=self._transposed)

    def nbytes(self, batch: int, capacities: Sequence[int]) -> int:
        """Return the bytes of a cache of this size, over all layers; ``capacities`` are theirs."""
        return sum(tensor.nbytes(batch, capacities[tensor.layer]) for tensor in self.tensors)

    # --- what it holds ---------------------------------------------------------------------------------------------

    def past_for(self, batch: int) -> Lengths:
        """Return the tokens that are there, int64 [B], for a step of so many rows; do not write to it.

        Raises:
            InputError: the cache holds another number of rows.
        """
        if batch == self.batch:
            return self.length
        if self.length.any():
            raise InputError(
                f"ids have {batch} rows and the cache holds {self.batch}", "call reset() to start another batch"
            )
        return np.zeros(batch, np.int64)

    def truncate(self, length: npt.NDArray[Any], given: Any, memory: CacheMemory | None = None) -> None:
        """Forget all but the first ``length`` tokens: one number, or one per row.

        Args:
            length: as an array.
            given: what it was made of, for the message.
            memory: of the cache, where rows may have to move.

        Raises:
            InputError: a length below 0 or above what the row holds.
        """
        self.length = self._checked_truncation(length, given)

    def revocable(self) -> int | None:
        """Return how many tokens beyond its first the next call may take for ``truncate`` to undo them: any, here."""
        return None

    def _checked_truncation(self, length: npt.NDArray[Any], given: Any) -> Lengths:
        """Return the tokens that are to stay, int64 [B]."""
        if length.dtype.kind not in "iu" or length.shape not in ((), self.length.shape):
            raise InputError(
                f"truncate got {given!r}", f"expected one whole number, or one for each of {self.batch} rows"
            )
        if (length < 0).any() or (length > self.length).any():
            raise InputError(
                f"cannot truncate to {length.tolist()}: the rows hold {self.length.tolist()} tokens",
                "expected numbers from 0 to those",
            )
        return np.broadcast_to(length, self.length.shape).astype(np.int64)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = np.zeros_like(self.length)

    def reusable(self, held: int, tokens: int) -> int:
        """Return how many of a sequence's first ``tokens`` can be kept as if no more than those had been run.

        Args:
            held: tokens of it that there are.
            tokens: at most ``held``.
        """
        return tokens

    def put(self, row: int, tokens: int) -> None:
        """Note that a row of the batch now holds so many tokens, whatever it held before."""
        self.length = self.length.copy()
        self.length[row] = tokens

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Note that rows of the batch now hold what another one does, whatever they held before."""
        for target in targets:
            self.put(target, int(self.length[source]))

    def cut(self, arrays: dict[str, npt.NDArray[Any]], held: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        """Return a sequence's arrays, of its first ``tokens``, where it had ``held`` of them: here, as they are."""
        return arrays

    # --- room for more ---------------------------------------------------------------------------------------------

    def plan(
        self,
        past: Lengths,
        counts: Lengths,
        tokens: int,
        logits_bytes: int,
        choose: Callable[[int, int, int], slice] = lambda first, stop, width: slice(None),
    ) -> list[Part]:
        """Cut T tokens per row into parts, for all of which there is room, padding included; none has run yet.

        Args:
            past: tokens that are there, int64 [B].
            counts: how many of the new ones are real, int64 [B].
            tokens: new ones per row (T).
            logits_bytes: that are returned.
            choose: the rows that a part computes, as ``Part.computing`` has it; all by default.

        Raises:
            CapacityError: one of them would pass the last position, or it takes more memory than is available.
        """
        longest = together = 0
        parts = [part.computing(choose) for part in self._parts(counts, tokens)]
        for part in parts:
            ends = self.reached(part, past + np.minimum(counts, part.start))
            self._check_end(past, ends)
            longest = max(longest, int(ends.max()))
            together = max(together, len(ends[part.rows]))
        self.check_memory(len(past), longest, min(tokens, self.chunk_size), logits_bytes, together)
        return parts

    def reached(self, part: Part, past: Lengths) -> Lengths:
        """Return up to where a step writes each row, int64 [B]: here, padding of the rows that it computes included.

        Args:
            part: the step.
            past: tokens that are there before it, int64 [B].
        """
        ends = past.copy()
        ends[part.rows] += part.width
        return ends

    def _parts(self, counts: Lengths, tokens: int) -> list[Part]:
        """Return the steps that T tokens per row take: here, chunks."""
        chunks = [(start, min(start + self.chunk_size, tokens)) for start in range(0, tokens, self.chunk_size)]
        return [Part(*chunk, counts, chunk) for chunk in chunks]

    def _check_end(self, past: Lengths, ends: Lengths) -> None:
        """Refuse a step that would pass the last position."""
        row = int(ends.argmax())
        if ends[row] > self.max_length:
            raise CapacityError(
                f"row {row} holds {int(past[row])} tokens and would reach {int(ends[row])} with the given ones, "
                f"padding included",
                f"{self._limit}: truncate, reset, or give fewer",
            )

    def prepare(self, part: Part, memory: CacheMemory) -> ManagedStep | None:
        """Do before a step what it needs, and return its inputs for a managed cache: here, nothing and None."""
        return None

    def past_of(self, part: Part, past: Lengths) -> Lengths:
        """Return what a step is told of the tokens that are there, ``past`` of the rows that it computes: the same."""
        return past

    def append(self, part: Part, memory: CacheMemory) -> Lengths:
        """Note a step that has run; return the tokens that there are now, int64 [B]."""
        self.length = self.length + part.real
        return self.length

    def check_memory(self, batch: int, tokens: int, width: int, logits_bytes: int, together: int | None = None) -> None:
        """Refuse what the system would end halfway, without a word, for want of memory.

        Args:
            batch: rows.
            tokens: that each row's cache has to hold.
            width: tokens of a row that are run at once, at most.
            logits_bytes: that are returned.
            together: rows that are computed at once; all by default.

        Raises:
            CapacityError: it takes more than is available.
        """
        computed = batch if together is None else together
        grows = self._grows(batch, tokens)
        if not grows and computed * width <= self._step_size and logits_bytes < _FEW_BYTES:
            return
        needed = logits_bytes
        if self._on_host:
            capacities = self.capacities_for(tokens) if grows else self.capacities
            needed += max(0, self.nbytes(batch, capacities) - self.nbytes(self.batch, self.capacities))
            if computed * width > self._step_size:
                execution = Execution(self._compute, self.dtype, width, writes_scores=True)
                needed += activation_bytes(self.config, execution, computed, width, max(capacities))
                if self.dtype != self._compute:  # a layer's cache at a time, in the type that it is attended to in
                    layer = cache_bytes(self.config, "fp32", max(capacities), computed) // len(capacities)
                    needed += layer * self._unpacked
        available = available_bytes()
        if available is not None and needed > available:
            raise CapacityError(
                f"{batch} rows of {tokens} tokens take {needed / 1e9:.2f} GB more of memory than the session has, and "
                f"{available / 1e9:.2f} GB are available",
                "give fewer rows or shorter prompts, or close other programs",
            )
        self._step_size = max(self._step_size, computed * width)

    def _grows(self, batch: int, tokens: int) -> bool:
        return batch != self.batch or tokens > self.capacity

    def capacity_for(self, tokens: int) -> int:
        """Return the capacity for ``tokens`` per row: in steps, never past P."""
        return min(self._in_steps(tokens), self.max_length)

    def _in_steps(self, tokens: int) -> int:
        """Round tokens up to whole steps, which are larger for more tokens."""
        step = self.capacity_step * max(1, tokens // (16 * self.capacity_step))
        return -(-tokens // step) * step

    def capacities_for(self, tokens: int) -> tuple[int, ...]:
        """Return the capacity of each layer for ``tokens`` per row."""
        return (self.capacity_for(tokens),) * len(self.capacities)

    def reserve(self, batch: int, tokens: int, resize: Callable[[int, Sequence[int]], None]) -> None:
        """Make room for ``tokens`` per row where there is none.

        Args:
            batch: rows.
            tokens: per row, that the cache has to hold.
            resize: makes memory for a batch and the layers' capacities, and keeps what is there while the batch is the
                same.
        """
        if self._grows(batch, tokens):
            capacities = self.capacities_for(tokens)
            resize(batch, capacities)
            self.length = self.past_for(batch)
            self.capacities = capacities

    @contextmanager
    def replacing(self, batch: int, clear: Callable[[], None]) -> Iterator[None]:
        """Replace buffers within this, for a batch: what is left of an attempt that failed is let go, and forgotten.

        Args:
            batch: rows; where it is another number than before, nothing is kept.
            clear: lets go of all buffers.
        """
        if batch != self.batch:
            self._drop()
            clear()  # before there are new ones
            self.length = np.zeros(batch, np.int64)
        try:
            yield
        except BaseException:  # buffers of both sizes are of no use
            self._drop()
            clear()
            raise

    def _drop(self) -> None:
        """Note that there is no memory, and so nothing in it."""
        self.capacities = (0,) * len(self.capacities)
        self.reset()

    def no_memory(self, batch: int, capacities: Sequence[int], detail: str = "") -> CapacityError:
        """Return the error for a cache that there is no memory for, after which it is empty."""
        size = self.nbytes(batch, capacities)
        return CapacityError(
            f"no memory for a cache of {size / 2**20:.0f} MiB ({batch} rows of {max(capacities)} tokens){detail}",
            "the cache was emptied: use a shorter context or fewer rows",
        )
