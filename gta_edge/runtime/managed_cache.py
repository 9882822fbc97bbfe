"""The bookkeeping of a cache that a policy manages: which row holds which token, when rows go, where the rest moves.

Three numbers that are one without a policy are apart here. ``length`` counts the tokens seen. ``rows`` counts the rows
in use, in each layer its own number: where a step writes, and what it sees. And a token's position is what its key was
rotated by: its place in time, until ``rotate`` renumbers it. So ``position + T <= P`` and ``rows + T <= S``.

Rows are evicted after each chunk of a prompt, and while single tokens come, before the step for which ``interval`` have
come since; so what a short call appended can still be truncated. The capacity is fixed: the budget of each layer, and
room for a chunk and an interval beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, ROW_CACHE_TYPES
from gta_edge.plan.cost import CacheRows
from gta_edge.plugins.attention.definition import Features
from gta_edge.plugins.attention.tiling import DECODE_TOKENS
from gta_edge.runtime.block_cache import BlockCache
from gta_edge.runtime.cache_moves import CacheMemory, Layout, ManagedStep, lay_out, merged
from gta_edge.runtime.cache_policies.base import CachePolicy, Rows
from gta_edge.runtime.cache_state import CacheState, Lengths, Part
from gta_edge.runtime.tree_cache import TreeCache

__all__ = ["GPU_CHUNK_SIZE", "OBSERVED_TOKENS", "SHORT_CALL", "ManagedCache", "cache_state"]

GPU_CHUNK_SIZE = 512
"""Tokens of a prompt at once, at most: a cache has room for so many more than its policy keeps."""

SHORT_CALL = 16
"""Tokens of a call that is no prompt, at most."""

OBSERVED_TOKENS = DECODE_TOKENS
"""Tokens of a call that observes, at most, where a backend has kernels of its own for it."""

_CAPACITY_STEP = 16

_OF_EACH_ROW = ("_evicted_at", "_newest_dropped", "_ahead", "_times", "_positions", "_counts", "_residual")
"""Of ``ManagedCache``, arrays [B] and [L, B, ...] of what is known of each row of the batch."""

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


class ManagedCache(CacheState):
    """The cache of one session, without its memory, as a policy keeps it small.

    Args:
        config: the model's sizes.
        policy: which rows stay.
        dtype: how cached values are stored, one of ``CACHES``.
        observed_tokens: tokens of the calls that can observe; then of each chunk of a prompt the last so many are calls
            of their own, and only they count. None where all calls observe.
        options: as ``CacheState`` takes them; the capacity follows from the policy.

    Raises:
        InputError: the policy keeps more rows than the model has positions, is of another model, or cannot go past the
            model's last position.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: CachePolicy,
        dtype: str = "fp32",
        *,
        observed_tokens: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, dtype, **options)
        self.policy = policy
        self._observed_tokens = observed_tokens if policy.observe else None
        self._budgets, self._has_budgets = self._checked_budgets()
        self._full = tuple(self._capacity_of(int(budget)) for budget in self._budgets)
        self._rotates = policy.rotate
        if self._rotates:
            self._check_rotation()
        self._begin()

    @property
    def features(self) -> Features:
        return Features(self.policy.observe, self.policy.bias_rows, has_positions=True)

    @property
    def observed_tokens(self) -> int | None:
        return self._observed_tokens

    # --- sizes -----------------------------------------------------------------------------------------------------

    def _checked_budgets(self) -> tuple[Lengths, bool]:
        """Return the rows of each layer that stay, int64 [L], and whether the policy says how many they are."""
        policy, layers, positions = self.policy, len(self.capacities), self.max_length
        if policy.rows is not None and policy.rows > positions:
            raise InputError(
                f"cache policy {policy.name} keeps {policy.rows} rows, and {self._limit}", f"give at most {positions}"
            )
        budgets = policy.budgets(layers)
        if budgets is None:
            return np.full(layers, positions, np.int64), False
        budgets = np.asarray(budgets)
        if budgets.shape != (layers,) or budgets.dtype.kind not in "iu" or (budgets < 1).any():
            raise InputError(
                f"cache policy {policy.name} has budgets of shape {list(budgets.shape)}, and the model {layers} layers",
                "give a whole number of at least 1 for each layer",
            )
        return np.minimum(budgets, positions).astype(np.int64), True

    def _capacity_of(self, budget: int) -> int:
        """Return the rows of a layer that there is memory for; spare ones, where residual rows begin, included."""
        rows = budget + self.policy.interval + self.chunk_size
        return min(-(-rows // _CAPACITY_STEP) * _CAPACITY_STEP, self.max_length) + self.policy.bias_rows

    @property
    def plan_rows(self) -> CacheRows:
        """The rows that there are and that there is memory for, for a plan."""
        observes = self.policy.observe is not None
        return CacheRows(tuple(self._budgets.tolist()), self._full, self.policy.interval, observes)

    def _check_rotation(self) -> None:
        policy = self.policy
        if policy.observe == "last":
            raise InputError(
                f"cache policy {policy.name} cannot rotate: what it observes are positions, which would change",
                "leave rotate out, or take another policy",
            )
        needed = int(self._budgets.max()) + policy.interval + self.chunk_size
        if needed > self.max_length:
            raise InputError(
                f"to rotate, rows, interval and a chunk ({needed} together) have to fit, and {self._limit}",
                "give fewer rows, or a smaller chunk_size",
            )

    def capacities_for(self, tokens: int) -> tuple[int, ...]:
        return self._full

    def _grows(self, batch: int, tokens: int) -> bool:
        return batch != self.batch or not self.capacity

    # --- what it holds ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Note that there is nothing in it."""
        layers, batch, capacity = len(self._full), self.batch, max(self._full)
        # rows in use of each layer, int64 [L, B], when the cache held so many tokens, int64 [B]
        self._noted: tuple[Lengths, Lengths] = np.zeros((layers, batch), np.int64), np.zeros(batch, np.int64)
        self._evicted_at = np.zeros(batch, np.int64)  # tokens seen at the last eviction
        self._newest_dropped = np.full(batch, -1, np.int64)  # the newest token that some layer no longer has
        self._ahead = np.zeros(batch, np.int64)  # by how much time is ahead of positions
        self._times = np.zeros((layers, batch, capacity), np.int64)  # of the noted rows
        self._positions = np.zeros((layers, batch, capacity if self._rotates else 0), np.int64)
        self._counts = np.ones((layers, batch, self.policy.bias_rows), np.float32)  # tokens that a row stands for
        self._residual = np.zeros(self._counts.shape, np.bool_)

    @property
    def rows(self) -> Lengths:
        self._match_batch()
        noted, seen = self._noted
        return noted + (self.length - seen)

    @property
    def filled(self) -> int:
        return int(self.rows.max(initial=0))

    def reset(self) -> None:
        super().reset()
        self._begin()

    def copy(self, source: int, targets: Sequence[int]) -> None:
        self._match_batch()
        super().copy(source, targets)

        def copied(array: npt.NDArray[Any]) -> npt.NDArray[Any]:  # [B], or [L, B, ...]
            array = array.copy()
            rows = array if array.ndim == 1 else array.swapaxes(0, 1)
            rows[list(targets)] = rows[source]
            return array

        self._noted = copied(self._noted[0]), copied(self._noted[1])
        for name in _OF_EACH_ROW:
            setattr(self, name, copied(getattr(self, name)))

    def _match_batch(self) -> None:
        if len(self._evicted_at) != self.batch:  # the cache is empty, and of another number of rows than before
            self._begin()

    def _note(self) -> Lengths:
        """Note which rows hold the tokens that were appended; return the rows in use, int64 [L, B]."""
        before, seen = self._noted
        rows = self.rows
        for b in np.flatnonzero(self.length > seen):
            times = np.arange(seen[b], self.length[b])
            for layer, start in enumerate(before[:, b]):
                self._times[layer, b, start : start + len(times)] = times
                if self._rotates:
                    self._positions[layer, b, start : start + len(times)] = times - self._ahead[b]
        self._noted = rows, self.length
        return rows

    def truncate(self, length: npt.NDArray[Any], given: Any, memory: CacheMemory | None = None) -> None:
        wanted = self._checked_truncation(length, given)
        self._match_batch()
        lost = (wanted > 0) & (wanted < self.length) & (wanted <= self._newest_dropped + 1)
        if lost.any():
            row = int(lost.argmax())
            raise InputError(
                f"cannot truncate row {row} to {int(wanted[row])} tokens: the policy has dropped some of them, up "
                f"to number {int(self._newest_dropped[row]) + 1}",
                "truncate to more tokens than that or to 0, or run the text again",
            )
        if not wanted.any():
            self.reset()
            return
        _, seen = self._noted
        if (wanted < seen).any():
            self._drop_newest(wanted, memory)
        self.length = wanted
        self._evicted_at = np.minimum(self._evicted_at, wanted)
        emptied = wanted == 0
        self._newest_dropped = np.where(emptied, -1, self._newest_dropped)
        self._ahead = np.where(emptied, 0, self._ahead)

    def _drop_newest(self, wanted: Lengths, memory: CacheMemory | None) -> None:
        """Drop the rows of tokens from ``wanted`` on, int64 [B], which lie anywhere since rows moved."""
        rows = self._note()
        shorter = np.flatnonzero(wanted < self.length).tolist()
        layouts = []
        for layer, b in itertools.product(range(len(rows)), shorter):
            keep = self._times[layer, b, : rows[layer, b]] < wanted[b]
            layouts.append((layer, b, self._laid_out(layer, b, keep)))
        self._apply(layouts, memory)
        self._noted = self._noted[0], np.minimum(self.length, wanted)

    def revocable(self) -> int | None:
        """Return how many tokens beyond its first a call may take so that rows go when they would go one by one.

        Raises:
            InputError: the policy observes attention, of which that of tokens that are taken back would stay.
        """
        if self.policy.observe:
            raise InputError(
                f"cache policy {self.policy.name} observes attention, and that of guessed tokens would count too",
                "leave speculation out, or take the policy window",
            )
        self._match_batch()
        since = self.length - self._evicted_at
        since = np.where(since >= self.policy.interval, 0, since)  # then rows go before the call
        room = self.policy.interval - 1 - int(since.max(initial=0))
        if self._rotates:  # likewise for a new numbering
            room = min(room, self.max_length - 1 - int((self.length - self._ahead).max(initial=0)))
        return max(0, room)

    # --- a step ----------------------------------------------------------------------------------------------------

    def _parts(self, counts: Lengths, tokens: int) -> list[Part]:
        if self._observed_tokens is None:
            return super()._parts(counts, tokens)
        parts = []
        for chunk in super()._parts(counts, tokens):
            ends = np.unique(np.append(chunk.real[chunk.real > 0], chunk.stop - chunk.start))
            cuts = np.unique(np.concatenate([[0], ends, np.maximum(ends - self._observed_tokens, 0)]))
            parts += [chunk.split(*each) for each in itertools.pairwise(cuts.tolist())]
        return parts

    def _check_end(self, past: Lengths, ends: Lengths) -> None:
        if not self._rotates:
            super()._check_end(past, ends)

    def prepare(self, part: Part, memory: CacheMemory) -> ManagedStep:
        self._match_batch()
        due = self._due(part)
        if due.any():
            self._evict(due, memory)
        if self._rotates:
            beyond = self.length - self._ahead + part.left > self.max_length
            if beyond.any():
                self._renumber(beyond, memory)
        rows, steps = self.rows, np.arange(part.width)
        weight, decay = self._weights(part, rows) if self.policy.observe else (None, None)
        return ManagedStep(
            past_length=rows,
            positions=np.minimum((self.length - self._ahead)[:, None] + steps, self.max_length - 1),  # of padding
            row_bias=np.log(self._counts) if self.policy.bias_rows else None,
            query_weight=weight,
            decay=decay,
        )

    def _due(self, part: Part) -> Mask:
        """Return which sequences rows are evicted from before a step, bool [B]: each as if it were alone."""
        due: Mask = self.length - self._evicted_at >= self.policy.interval
        if part.start:  # of a prompt rows go at the end of its chunks; what a short call appended stays until the next
            goes_on = (part.real > 0) & (part.start == part.chunk[0])
            no_room = (self.rows + part.width > np.array(self._full)[:, None]).any(0)  # for padding beside a prompt
            due &= (part.counts <= SHORT_CALL) & (goes_on | no_room)
        return due

    def append(self, part: Part, memory: CacheMemory) -> Lengths:
        super().append(part, memory)
        prompts = (part.counts > SHORT_CALL) & (self.length > self._evicted_at)
        if part.ends_chunk and prompts.any():
            self._evict(prompts, memory)
        return self.length

    def _weights(self, part: Part, rows: Lengths) -> tuple[Floats, Floats]:
        """Return ``query_weight`` [B, T] and ``decay`` [B]: each sequence's for its own tokens, padding left out.

        Where only the last tokens of a chunk observe, they count as in the whole chunk, and what was received before it
        decays by all of it, once.
        """
        batch, real, begin, observed = self.batch, part.real, part.start, self._observed_tokens
        if observed is not None:
            begin = part.chunk[0]
            ends = np.minimum(part.counts, part.chunk[1])
            real = np.where(part.at_end(observed), ends - begin, 0)
        before, width = part.start - begin, part.width  # tokens of the chunk that have run
        steps = np.arange(-before, max(width, int(real.max()) - before))
        times = self.length[:, None] + steps
        visible = np.maximum(np.rint(rows.mean(0)).astype(np.int64)[:, None] + steps + 1, 1)
        if (real == len(steps)).all() and not before:
            weight, decay = self.policy.weights(times, visible)
            return np.ascontiguousarray(weight[:, :width]), decay
        weight, decay = np.zeros((batch, width), np.float32), np.ones(batch, np.float32)
        for tokens in np.unique(real[real > 0]).tolist():
            which = np.flatnonzero(real == tokens)
            weights, decays = self.policy.weights(times[which, :tokens], visible[which, :tokens])
            shown = weights[:, before : before + width]
            weight[which, : shown.shape[1]] = shown
            if observed is None or part.start == max(begin, begin + tokens - observed):
                decay[which] = decays
        return weight, decay

    # --- eviction --------------------------------------------------------------------------------------------------

    def _evict(self, which: Mask, memory: CacheMemory) -> None:
        """Ask the policy about sequences, bool [B], and do as it says. Nothing has changed where it says nonsense."""
        rows = self._note()
        over = (rows > self._budgets[:, None]) & which if self._has_budgets else np.broadcast_to(which, rows.shape)
        received = memory._received() if self.policy.observe and over.any() else None
        layouts, newest = [], self._newest_dropped.copy()
        for layer, b in np.argwhere(over).tolist():
            count = int(rows[layer, b])
            seen = Rows(
                layer=layer,
                budget=int(self._budgets[layer]) if self._has_budgets else None,
                length=int(self.length[b]),
                positions=self._times[layer, b, :count].copy(),
                received=None if received is None else received[layer][b, :count].copy(),
                counts=self._counts_of(layer, b, count),
                begun=self._residual_of(layer, b, count),
            )
            layout = self._decided(seen, b)
            if layout is not None:
                layouts.append((layer, b, layout))
                dropped = np.ones(count, np.bool_)
                dropped[layout.origin[layout.counts == 1]] = False  # what is merged cannot be told apart again
                newest[b] = max(newest[b], seen.positions[dropped].max(initial=-1))
        self._apply(layouts, memory)
        self._newest_dropped = newest
        self._evicted_at = np.where(which, self.length, self._evicted_at)

    def _counts_of(self, layer: int, b: int, count: int) -> Floats:
        counts = np.ones(count, np.float32)
        few = min(count, self.policy.bias_rows)
        counts[:few] = self._counts[layer, b, :few]
        return counts

    def _residual_of(self, layer: int, b: int, count: int) -> Mask:
        residual = np.zeros(count, np.bool_)
        few = min(count, self.policy.bias_rows)
        residual[:few] = self._residual[layer, b, :few]
        return residual

    def _decided(self, rows: Rows, b: int) -> Layout | None:
        """Return where rows go as the policy says; None where all stay.

        Raises:
            InputError: what it says makes no sense.
        """
        decision, count, most = self.policy.keep(rows), len(rows), self.policy.bias_rows
        keep, into = np.asarray(decision.keep), None if decision.residual is None else np.asarray(decision.residual)
        if keep.shape != (count,) or keep.dtype != np.bool_:
            raise self._nonsense(rows, f"keep is {keep.dtype} of shape {list(keep.shape)}, and there are {count} rows")
        last = -1
        if into is not None:
            if into.shape != (count,) or into.dtype.kind not in "iu":
                problem = f"residual is {into.dtype} of shape {list(into.shape)}, and there are {count} rows"
                raise self._nonsense(rows, problem)
            last = int(into[~keep].max(initial=-1))
            if last >= min(most, count):
                raise self._nonsense(rows, f"it folds into residual row {last}, and has {most} of {count} rows")
        if keep.all():
            return None
        layout = self._laid_out(rows.layer, b, keep, into)
        stay = len(layout.origin)
        if last >= stay:
            raise self._nonsense(rows, f"it folds into residual row {last}, and {stay} rows stay")
        if rows.budget is not None and stay > rows.budget:
            raise self._nonsense(rows, f"it keeps {stay} rows of a budget of {rows.budget}")
        return layout

    def _nonsense(self, rows: Rows, problem: str) -> InputError:
        return InputError(f"cache policy {self.policy.name}, layer {rows.layer}: {problem}", "mend its keep()")

    def _laid_out(self, layer: int, b: int, keep: Mask, into: Lengths | None = None) -> Layout:
        count = len(keep)
        times, counts = self._times[layer, b, :count], self._counts_of(layer, b, count)
        return lay_out(keep, into, times, counts, self._residual_of(layer, b, count))

    def _apply(self, layouts: list[tuple[int, int, Layout]], memory: CacheMemory | None) -> None:
        """Move rows, and note where they are; where moving fails, the cache is emptied."""
        if not layouts:
            return
        rows = self._noted[0].copy()
        try:
            for moves in merged(layouts):
                assert memory is not None  # who moved rows has it
                memory._move(moves)
            for layer, b, layout in layouts:
                stay = len(layout.origin)
                self._times[layer, b, :stay] = self._times[layer, b, layout.origin]
                if self._rotates:
                    self._positions[layer, b, :stay] = self._positions[layer, b, layout.origin]
                few = min(stay, self.policy.bias_rows)
                self._counts[layer, b], self._residual[layer, b] = 1, False
                self._counts[layer, b, :few], self._residual[layer, b, :few] = (
                    layout.counts[:few],
                    layout.residual[:few],
                )
                rows[layer, b] = stay
            self._noted = rows, self._noted[1]
        except BaseException:  # some rows have been moved
            self.reset()
            raise

    # --- past the last position ------------------------------------------------------------------------------------

    def _renumber(self, which: Mask, memory: CacheMemory) -> None:
        """Give rows consecutive positions, the newest the same in all layers, and rotate their keys accordingly.

        Of a window only sinks come closer; rows that lie scattered lose the distances between them.
        """
        rows = self._note()
        tops = rows.max(0)
        shifts = [np.zeros((self.batch, capacity), np.int64) for capacity in self._full]
        for layer, shift in enumerate(shifts):
            for b in np.flatnonzero(which):
                count = rows[layer, b]
                order = self._times[layer, b, :count].argsort()
                renumbered = np.empty(count, np.int64)
                renumbered[order] = np.arange(tops[b] - count, tops[b])
                shift[b, :count] = renumbered - self._positions[layer, b, :count]
                self._positions[layer, b, :count] = renumbered
        try:
            memory._rotate(shifts)
        except BaseException:  # some keys have been rotated
            self.reset()
            raise
        self._ahead = np.where(which, self.length - tops, self._ahead)


def cache_state(
    config: ModelConfig, dtype: str = "fp32", policy: CachePolicy | None = None, *, trees: bool = False, **options: Any
) -> CacheState:
    """Return the state of a session's cache.

    Args:
        config: the model's sizes.
        dtype: how cached values are stored, one of ``CACHES``.
        policy: which rows stay; None for all.
        trees: whether it holds trees of tokens.
        options: as ``CacheState`` takes them, and where there is a policy, ``ManagedCache``, or trees, ``TreeCache``.

    Raises:
        InputError: an option, or a policy, that makes no sense for this model, a policy and trees, or one of them and
            a cache in blocks.
    """
    if policy is not None and trees:
        raise InputError(
            f"trees of tokens do not go with cache policy {policy.name}, which would drop rows of them",
            "leave the policy or the trees out",
        )
    mover = "trees of tokens move" if trees else f"cache policy {policy.name} moves" if policy is not None else None
    if mover is not None and dtype in BLOCK_CACHE_TYPES:
        raise InputError(
            f"{mover} rows one by one, and a cache of {dtype} is quantised in blocks",
            f"take a cache of {ROW_CACHE_TYPES[0]}, or leave {'trees' if trees else 'the policy'} out",
        )
    if trees:
        return TreeCache(config, dtype, **options)
    if policy is not None:
        return ManagedCache(config, policy, dtype, **options)
    return (BlockCache if dtype in BLOCK_CACHE_TYPES else CacheState)(config, dtype, **options)
