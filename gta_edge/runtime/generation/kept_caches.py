"""Caches of texts that have ended, kept so that the next prompt that begins like one of them need not be read again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session import Ids

__all__ = ["KeptCaches", "common_prefix", "longest"]


@dataclass(frozen=True)
class _Kept:
    ids: Ids
    saved: SavedCache


class KeptCaches:
    """Caches in the host's memory, by the tokens that they are of; those not used for longest go first.

    Args:
        max_bytes: what they may take together.

    Attributes:
        nbytes: what they take.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: list[_Kept] = []  # the one used last at the end
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, ids: Ids, saved: SavedCache) -> list[tuple[Ids, SavedCache]]:
        """Keep the cache of ``ids`` [N]; return those that had to go, this one where it is too large by itself.

        What this one begins with is not kept beside it, and this one not beside another that begins with it.
        """
        if any(common_prefix(ids, each.ids) == len(ids) for each in self._kept):
            self.find(ids)  # which makes it the one used last
            return []
        for each in [each for each in self._kept if common_prefix(ids, each.ids) == len(each.ids)]:
            self._remove(each)
        gone = []
        while self._kept and self.nbytes + saved.nbytes > self._max_bytes:
            gone.append(self._kept[0])
            self._remove(self._kept[0])
        if saved.nbytes > self._max_bytes:
            gone.append(_Kept(ids, saved))
        else:
            self._kept.append(_Kept(ids.copy(), saved))
            self.nbytes += saved.nbytes
        return [(each.ids, each.saved) for each in gone]

    def find(self, ids: Ids) -> tuple[SavedCache, int] | None:
        """Return the cache with the longest prefix of ``ids`` [N], and its length; None where none has any."""
        place, length = longest(ids, [each.ids for each in self._kept])
        if not length:
            return None
        found = self._kept.pop(place)
        self._kept.append(found)
        return found.saved, length

    def clear(self) -> list[tuple[Ids, SavedCache]]:
        """Return all that is kept, and keep none of it any more."""
        gone = [(each.ids, each.saved) for each in self._kept]
        self._kept, self.nbytes = [], 0
        return gone

    def _remove(self, kept: _Kept) -> None:
        self._kept = [each for each in self._kept if each is not kept]
        self.nbytes -= kept.saved.nbytes


def common_prefix(one: Ids, other: Ids) -> int:
    """Return how many tokens two texts have in common at the beginning."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size


def longest(ids: Ids, others: Iterable[Ids]) -> tuple[int, int]:
    """Return which of the others begins most like ``ids``, and how many tokens they have in common; 0, 0 if none."""
    best = (0, 0)
    for place, other in enumerate(others):
        length = common_prefix(ids, other)
        if length > best[1]:
            best = place, length
    return best
