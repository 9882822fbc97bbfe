"""What a backend adds to a session: how memory is held, how one chunk is run, and how rows of the cache are changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.runtime.cache_moves import ManagedStep, Moves

__all__ = ["Ids", "Logits", "SessionBackend"]

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class SessionBackend(ABC):
    """What ``Session`` asks of the class that is derived from it; all of it is called by the session alone."""

    backend: str
    """Name of the backend, as ``--backend`` takes it."""

    _first_row = 0
    """Of the batch, that a step computes."""

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
            managed: inputs of a managed cache, whose ``past_length`` counts; None of a session without a policy and
                without trees.
        """

    # Not abstract: a backend without policies, trees, a cache in blocks or exports has nothing to do in these, and is
    # never asked. The errors are for a subclass that says that it has one of them and leaves out what it takes.

    def _move(self, moves: Moves) -> None:
        """Fold and copy rows of the cache, of every tensor of their layers; see ``Moves``."""
        raise NotImplementedError(f"{self.backend} manages no cache")

    def _received(self) -> list[npt.NDArray[np.float32]]:
        """Return what each layer's rows received, float32 [B, S] per layer, in the host's memory; only to be read."""
        raise NotImplementedError(f"{self.backend} manages no cache")

    def _rotate(self, shifts: Sequence[Ids]) -> None:
        """Rotate keys as if their tokens' positions were larger by ``shifts[i]``, int64 [B, S], in layer i."""
        raise NotImplementedError(f"{self.backend} manages no cache")

    def _reopen(self, sequence: int, block: int) -> None:
        """Put what the codes of a block stand for into a sequence's open block, in every layer; see ``BlockCache``."""
        raise NotImplementedError(f"{self.backend} has no cache in blocks")

    def _read_row(self, row: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        """Return the first tokens of a row of the batch: by ``CacheTensor.name`` an array of its own in host memory.

        Each has the extents ``CacheTensor.shape(1, tokens)``.
        """
        raise NotImplementedError(f"{self.backend} exports no cache")

    def _write_row(self, row: int, tokens: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put what ``_read_row`` returned in its place in a row of the batch, for which there is room."""
        raise NotImplementedError(f"{self.backend} exports no cache")

    def _copy_row(self, source: int, targets: Sequence[int], rows: Sequence[int]) -> None:
        """Copy what a row of the batch holds into others, ``rows[i]`` rows of memory in every tensor of layer i."""
        raise NotImplementedError(f"{self.backend} copies no rows of a batch")

    def _zero_free_rows(self) -> None:  # noqa: B027  where kernels read no more rows than there are, nothing is to be done
        """Make zeros of all rows of the cache that hold no token: their weight is zero, and zero times NaN is NaN."""

    def _release(self) -> None:  # noqa: B027  a backend may have nothing to free
        """Free what the session holds; called once."""
