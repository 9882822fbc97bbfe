"""What a managed cache asks of a backend: the inputs of a step, and which rows go where between steps.

A policy's decisions become moves: rows that are not kept leave holes, and the holes are filled from the end. So only as
many rows move as were evicted, none is overwritten before it has moved, and nothing is copied twice. The order of rows
is then no longer that of time, which attention does not depend on: the position is in the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ManagedStep", "Moves"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


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
    """

    past_length: Integers
    positions: Integers
    row_bias: Floats | None = None
    query_weight: Floats | None = None
    decay: Floats | None = None


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
