"""Caches of texts that have ended, kept so that the next prompt that begins like one of them need not be read again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gta_edge.runtime.prompt_cache import PromptCacheDirectory
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session import Ids

__all__ = ["KeptCaches", "common_prefix", "longest"]


@dataclass
class _Kept:
    ids: Ids
    saved: SavedCache
    was_used: bool  # it, or what it grew from


class KeptCaches:
    """Caches in the host's memory, by the tokens that they are of; those not used for longest go first.

    Args:
        max_bytes: what they may take together.
        directory: where those go that have to go, and come from. In between only those that were of use, since a
            directory is slow and wears out, in the end all. By default they are gone.

    Attributes:
        nbytes: what they take in memory.
    """

    def __init__(self, max_bytes: int, directory: PromptCacheDirectory | None = None) -> None:
        self._max_bytes, self._directory = max_bytes, directory
        self._kept: list[_Kept] = []  # the one used last at the end
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, ids: Ids, saved: SavedCache) -> None:
        """Keep the cache of ``ids`` [N].

        What this one begins with is not kept beside it, and this one not beside another that begins with it. One that
        is larger than all may be together takes no other's place, and goes to the directory at once.
        """
        if longest(ids, [each.ids for each in self._kept])[1] == len(ids):
            self._use(ids)
            return
        shorter = [each for each in self._kept if common_prefix(ids, each.ids) == len(each.ids)]
        new = _Kept(ids.copy(), saved, any(each.was_used for each in shorter))
        if saved.nbytes > self._max_bytes:
            self._write(new, only_used=False)
            return
        for each in shorter:
            self._remove(each)
        self._kept.append(new)
        self.nbytes += saved.nbytes
        while self.nbytes > self._max_bytes:
            self._give_up(self._kept[0], only_used=True)

    def find(self, ids: Ids, least: int = 1) -> tuple[SavedCache, int] | None:
        """Return the cache with the longest prefix of ``ids`` [N], and its length; None where none has any.

        Args:
            ids: tokens of a prompt.
            least: tokens of a prefix that is worth it.
        """
        _, length = longest(ids, [each.ids for each in self._kept])
        if self._directory is not None:
            place, there = longest(ids, self._directory.texts)
            saved = self._directory.take(place) if there > max(length, least - 1) else None
            if saved is not None:
                self.put(self._directory.texts[-1], saved)  # where what was taken last is
                return saved, there
        return (self._use(ids), length) if length >= least else None

    def flush(self) -> None:
        """Keep nothing in memory any more."""
        while self._kept:
            self._give_up(self._kept[0], only_used=False)

    def _use(self, ids: Ids) -> SavedCache:
        """Return the one with the longest prefix of ``ids``, which is then the one used last."""
        found = self._kept.pop(longest(ids, [each.ids for each in self._kept])[0])
        self._kept.append(found)
        found.was_used = True
        return found.saved

    def _give_up(self, kept: _Kept, *, only_used: bool) -> None:
        self._remove(kept)
        self._write(kept, only_used=only_used)

    def _write(self, kept: _Kept, *, only_used: bool) -> None:
        if self._directory is not None and (kept.was_used or not only_used):
            self._directory.put(kept.ids, kept.saved)

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
