"""What a call of a session costs by its width, learned from the calls that were made anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

__all__ = ["WIDTHS", "StepCosts", "graph_width", "padded_width"]

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens of a call that continues a text. They are few, so that what a backend makes for a width is used again."""

_SAMPLES = 9  # of a width: what counts is what it costs now, at this length of the context
_ASSUMED_SLOPE = 0.3  # of a single token, for each token more, until a second width was measured
_FORGET_AFTER = 128  # calls
_SINGLE_EVERY = 48  # calls
_SINGLE_KEPT = 2  # samples of a single token that count beside a new one, after so many calls
_SINGLE = (False, 1)


def padded_width(tokens: int) -> int:
    """Return the least of ``WIDTHS`` that so many tokens, at most the largest of them, go into."""
    return next(width for width in WIDTHS if width >= tokens)


def graph_width(
    tokens: int,
    rows: npt.NDArray[np.int64],
    capacities: Sequence[int],
    *,
    limit: int = WIDTHS[-1],
    padding: bool = True,
) -> int:
    """Return the width of the CUDA graph that appends so many tokens, padded to it; 0 where there can be none.

    What pads them is written to rows behind theirs, for which there has to be room.

    Args:
        tokens: of each row of the batch.
        rows: in use, int64 [B], or by layer [L, B].
        capacities: rows that each layer has room for.
        limit: most tokens that there are graphs for, at most the largest of ``WIDTHS``.
        padding: whether tokens may be padded, which would close blocks of a cache in blocks.
    """
    if tokens > limit:
        return 0
    width = min(padded_width(tokens), limit)
    if width == tokens:
        return width
    room = np.array(capacities)[:, None] - width  # [L, 1]
    return width if padding and (rows.reshape(-1, rows.shape[-1]) <= room).all() else 0


class StepCosts:
    """Seconds that calls of one session take, by their width.

    A width that was not tried is estimated from those that were: between two by a straight line, beyond them by going
    on as between the last two. The first call of a width is not counted, since it may bind memory or capture a graph,
    and one that was not used for long is forgotten, since costs grow with the context.

    Calls for a tree of tokens are counted by themselves. Of a width that no tree had, they are taken to cost as much
    more or less than others as those of the nearest width did.
    """

    def __init__(self) -> None:
        self._samples: dict[tuple[bool, int], deque[float]] = {}  # by whether it was a tree, and the width
        self._used: dict[tuple[bool, int], int] = {}  # when each was used last, in calls
        self._calls = 0
        self._leaves_out = False
        self._medians: dict[bool, dict[int, float]] = {}  # of samples, likewise; made as they are needed

    def leave_out(self) -> None:
        """Do not count the call that runs now: it makes something that the next ones of its width use."""
        self._leaves_out = True

    def add(self, width: int, seconds: float, *, tree: bool = False) -> None:
        """Note what a call took."""
        kind = tree, width
        self._calls += 1
        left_out, self._leaves_out = self._leaves_out, False
        if kind == _SINGLE and self.due:  # what it took before may be what something else made it take
            self._samples[kind] = deque(list(self._samples[kind])[-_SINGLE_KEPT:], maxlen=_SAMPLES)
        if kind in self._used and not left_out:
            self._samples.setdefault(kind, deque(maxlen=_SAMPLES)).append(seconds)
        self._used[kind] = self._calls
        for old in [each for each in self._samples if each != _SINGLE and self._unused(each) > _FORGET_AFTER]:
            del self._samples[old]
        self._medians = {}

    @property
    def known(self) -> bool:
        """Whether a single token was measured: what others cost is compared with it."""
        return _SINGLE in self._samples

    @property
    def due(self) -> bool:
        """Whether all calls were wider for so long that the next one had better be of a single token, to measure it."""
        return _SINGLE in self._samples and self._unused(_SINGLE) > _SINGLE_EVERY

    def seconds(self, width: int, *, tree: bool = False) -> float:
        """Return what a call of a width takes; a single token has to be known."""
        trees = self._known(tree=True) if tree else {}
        if not trees:
            return self._estimate(width)
        nearest = min(trees, key=lambda other: abs(other - width))
        return trees[nearest] if nearest == width else trees[nearest] * self._estimate(width) / self._estimate(nearest)

    def least_of_a_token(self) -> float:
        """Return what a token more of a call takes at least, as a part of a call of a single token."""
        single = self.seconds(1)
        return min((self.seconds(width) / single - 1) / (width - 1) for width in WIDTHS[1:])

    def _unused(self, kind: tuple[bool, int]) -> int:
        return self._calls - self._used[kind]

    def _known(self, *, tree: bool) -> dict[int, float]:
        """Return what was measured, by the width."""
        if tree not in self._medians:
            of = sorted((width, samples) for (kind, width), samples in self._samples.items() if kind == tree)
            self._medians[tree] = {width: median(samples) for width, samples in of}
        return self._medians[tree]

    def _estimate(self, width: int) -> float:
        """Return what a call that is no tree takes."""
        known = self._known(tree=False)
        if width in known:
            return known[width]
        below, above = [w for w in known if w < width], [w for w in known if w > width]
        last = below[-1]
        if above:
            return _on_line(width, last, known[last], above[0], known[above[0]])
        if len(below) > 1:
            return max(known[last], _on_line(width, below[-2], known[below[-2]], last, known[last]))
        return known[1] * (1 + _ASSUMED_SLOPE * (width - 1))


def _on_line(x: int, x0: int, y0: float, x1: int, y1: float) -> float:
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
