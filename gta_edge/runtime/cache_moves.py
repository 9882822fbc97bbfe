"""What a managed cache asks of a backend: the inputs of a step, and which rows go where between steps.

A policy's decision becomes moves: rows that are not kept leave holes, and the holes are filled from the end. So only as
many rows move as were evicted, none is overwritten before it has moved, and nothing is copied twice. The order of rows
is then no longer that of time, which attention does not depend on: the position is in the key.

Residual row i, which others are folded into, lies in row i. What stands there when it begins, and stays, is moved
behind the rows in use first, for which a cache has as many spare rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gta_edge.model.kv_cache import BRANCH_START, PAST_LENGTH, TREES
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS, Features

__all__ = ["CacheMemory", "Layout", "ManagedStep", "Moves", "by_layer", "causal_words", "lay_out", "merged"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_BY_LAYER = frozenset({"past_length", "row_bias", "branch_start"})
"""Inputs of a step whose first axis is the layer, and whose second is the row of the batch."""


def causal_words(tokens: int) -> Integers:
    """Return the words of new tokens that each see those before them: none of more than a word has bits."""
    steps = np.arange(tokens if tokens <= MAX_BRANCH_TOKENS else 0)
    words: Integers = np.full(len(steps), -1, np.int64) << steps
    return words


@dataclass(frozen=True)
class ManagedStep:
    """Inputs of one step over a managed cache, as the managed graph takes them.

    Attributes:
        past_length: rows in use of each layer, int64 [L, B]: where the step writes, and what it sees.
        positions: of the new tokens, int64 [B, T], which their keys are rotated by.
        row_bias: added to the scores of rows 0 to R - 1, float32 [L, B, R]; None where the policy folds no rows.
        query_weight: how much each query's attention counts in what rows receive, float32 [B, T]; None where nothing
            is observed.
        decay: what remains of what rows have received before, float32 [B]; None likewise.
        branch_start: the first row of each layer that not every new token sees, int64 [L, B]; None without branches.
        branches: a word for each row from there on, with a bit for each new token, int64 [B, W]; None likewise.
        causal: whether branches and positions say what is so without them.
    """

    past_length: Integers
    positions: Integers
    row_bias: Floats | None = None
    query_weight: Floats | None = None
    decay: Floats | None = None
    branch_start: Integers | None = None
    branches: Integers | None = None
    causal: bool = False

    def given(self, features: Features) -> dict[str, npt.NDArray[Any]]:
        """Return those that there are, by the names of the graph's inputs, which are these.

        Args:
            features: of the graph; one for trees has no axis for layers, whose rows are the same.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if features == TREES:
            values |= {name: values[name][0] for name in (PAST_LENGTH, BRANCH_START)}
        return {name: array for name, array in values.items() if isinstance(array, np.ndarray)}

    def of_rows(self, rows: slice) -> ManagedStep:
        """Return the inputs of some rows of the batch."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: array for name, array in given.items() if isinstance(array, np.ndarray)}
        parts = {name: array[:, rows] if name in _BY_LAYER else array[rows] for name, array in arrays.items()}
        return ManagedStep(**(given | parts))

    def of_tokens(self, start: int, stop: int) -> ManagedStep:
        """Return the inputs of some of the tokens, where those before them have been run.

        Once all have been run so, the cache is as if they had been at once: what was received before decays with the
        first of them. Tokens of trees are at most as many as a word has bits.
        """
        weight, decay, branches = self.query_weight, self.decay, self.branches
        past, branch_start = self.past_length + start, self.branch_start
        if self.causal:
            chain = causal_words(stop - start)
            branch_start = past if len(chain) else past + stop - start
            branches = np.broadcast_to(chain, (past.shape[1], len(chain)))
        elif branches is not None:
            branches = (branches.view(np.uint64) >> np.uint64(start)).view(np.int64)
        return replace(
            self,
            past_length=past,
            positions=self.positions[:, start:stop],
            query_weight=None if weight is None else weight[:, start:stop],
            decay=np.ones_like(decay) if decay is not None and start else decay,
            branch_start=branch_start,
            branches=branches,
        )

    def padded(self, tokens: int, words: int = 0) -> ManagedStep:
        """Return the inputs with so many tokens more, and words up to so many: of what sees and weighs nothing."""
        weight, branches = self.query_weight, self.branches
        if branches is not None:
            branches = np.pad(branches, ((0, 0), (0, max(0, words - branches.shape[1]))))
        return replace(
            self,
            positions=np.pad(self.positions, ((0, 0), (0, tokens))),
            query_weight=None if weight is None else np.pad(weight, ((0, 0), (0, tokens))),
            branches=branches,
        )


@dataclass(frozen=True)
class Moves:
    """Rows to fold and to copy. Folds come first.

    Attributes:
        moves: int32 [N, 4], columns layer, sequence, source row, target row, by layer in ascending order: the source is
            copied to the target in every tensor of the layer (key, latent, scales, received). No target is a source,
            and none occurs twice.
        folds: int32 [F, 4], the same columns, by layer: each target becomes the sum of weight times source over all
            folds with that target, in keys and latents (those of 8 bits are dequantised, and quantised again). A target
            is one of its own sources, with weight 0 where nothing of it stays, and no source of another target.
        fold_weights: float32 [F]; those of one target sum to 1.
    """

    moves: npt.NDArray[np.int32]
    folds: npt.NDArray[np.int32]
    fold_weights: Floats

    def __bool__(self) -> bool:
        return bool(len(self.moves) or len(self.folds))

    def of_layer(self, layer: int) -> Moves:
        """Return those of one layer."""
        moves, folds = (rows[:, 0] == layer for rows in (self.moves, self.folds))
        return Moves(self.moves[moves], self.folds[folds], self.fold_weights[folds])


def by_layer(rows: npt.NDArray[np.int32]) -> Iterator[tuple[int, slice]]:
    """Yield the layers of ``moves`` or ``folds``, and where each one's are."""
    layers, starts = np.unique(rows[:, 0], return_index=True)
    bounds = np.append(starts, len(rows)).tolist()
    yield from zip(layers.tolist(), map(slice, bounds[:-1], bounds[1:]), strict=True)


class CacheMemory(Protocol):
    """What a session adds to the bookkeeping of a managed cache, or of one in blocks; see ``Session``."""

    def _move(self, moves: Moves) -> None: ...

    def _received(self) -> list[Floats]: ...

    def _rotate(self, shifts: Sequence[Integers]) -> None: ...

    def _reopen(self, sequence: int, block: int) -> None: ...


# --- from decisions to moves -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the rows of one layer of one sequence go: n rows become K. Pairs are source row and target row.

    Attributes:
        origin: for each row that there is then, the old row that it was, int64 [K]; for a residual row the newest of
            those folded into it.
        counts: tokens that each row then stands for, float32 [K].
        residual: which rows are residual rows then, bool [K].
        moves: int64 [N, 2].
        relocated: moves before everything else, int64 [M, 2]; their targets are behind the n rows.
        folds: after those, int64 [F, 2].
        fold_weights: float32 [F].
    """

    origin: Integers
    counts: Floats
    residual: Mask
    moves: Integers
    relocated: Integers
    folds: Integers
    fold_weights: Floats


def lay_out(keep: Mask, into: Integers | None, positions: Integers, counts: Floats, residual: Mask) -> Layout:
    """Return where rows go after a decision; holes are filled from the end.

    Args:
        keep: rows that stay, bool [n].
        into: index of the residual row that each row which does not stay is folded into, int64 [n], or -1; None
            where none is. A residual row that is folded into needs a row for it: its index is below the number of rows
            that there are then.
        positions: of each row's token, int64 [n].
        counts: tokens that each row stands for, float32 [n].
        residual: which rows are residual rows, bool [n].
    """
    count = len(keep)
    targets = [] if into is None else np.unique(into[~keep & (into >= 0)]).tolist()
    content = np.arange(count + len(targets))  # the old row that lies in each
    occupied = np.concatenate([keep, np.zeros(len(targets), np.bool_)])
    counts, residual = (np.concatenate([array, np.zeros(len(targets), array.dtype)]) for array in (counts, residual))
    relocated: list[tuple[int, int]] = []
    folds: list[Integers] = []
    weights: list[Floats] = []
    if into is not None and targets:
        place = np.arange(count)  # where each old row lies
        begins = [target for target in targets if not (keep[target] and residual[target])]
        for target in begins:
            if keep[target] or into[target] not in (-1, target):
                spare = count + len(relocated)
                relocated.append((target, spare))
                place[target], content[spare] = spare, target
                occupied[spare], counts[spare] = keep[target], counts[target]
        tokens = counts.copy()
        for target in targets:
            members = np.flatnonzero(~keep & (into == target))
            if target not in begins:
                members = np.append(members, target)
            total = tokens[members].sum()
            sources, shares = place[members], tokens[members] / total
            if target not in sources:
                sources, shares = np.append(sources, target), np.append(shares, np.float32(0))
            folds.append(np.stack([sources, np.full(len(sources), target)], 1))
            weights.append(shares.astype(np.float32))
            content[target] = members[positions[members].argmax()]
            counts[target], residual[target], occupied[target] = total, True, True
    stay = int(occupied.sum())
    holes = np.flatnonzero(~occupied[:stay])
    sources = stay + np.flatnonzero(occupied[stay:])
    for array in (content, counts, residual):
        array[holes] = array[sources]
    none = np.zeros((0, 2), np.int64)
    return Layout(
        origin=content[:stay],
        counts=counts[:stay],
        residual=residual[:stay],
        moves=np.stack([sources, holes], 1),
        relocated=np.array(relocated, np.int64).reshape(-1, 2),
        folds=np.concatenate(folds) if folds else none,
        fold_weights=np.concatenate(weights) if weights else np.zeros(0, np.float32),
    )


def merged(layouts: Sequence[tuple[int, int, Layout]]) -> list[Moves]:
    """Return the moves of several layers and sequences at once, one after the other: what is relocated, and the rest.

    Args:
        layouts: layer, sequence, and where its rows go; by layer.
    """

    def placed(name: str) -> npt.NDArray[np.int32]:
        pairs = [getattr(layout, name) for _, _, layout in layouts]
        where = [(layer, sequence) for layer, sequence, _ in layouts]
        sizes = [len(each) for each in pairs]
        columns = np.repeat(np.array(where, np.int32).reshape(-1, 2), sizes, 0)
        return np.concatenate([columns, np.concatenate([np.zeros((0, 2), np.int32), *pairs])], 1).astype(np.int32)

    nothing = np.zeros((0, 4), np.int32), np.zeros(0, np.float32)
    weights = np.concatenate([np.zeros(0, np.float32), *(layout.fold_weights for _, _, layout in layouts)])
    found = [Moves(placed("relocated"), *nothing), Moves(placed("moves"), placed("folds"), weights)]
    return [moves for moves in found if moves]
