"""What a call of a session costs by its width, learned from the calls that were made anyway."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["WIDTHS", "StepCosts", "padded_width"]

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Tokens of a call that continues a text. They are few, so that what a backend makes for a width is used again."""

_SAMPLES = 9  # of a width: what counts is what it costs now, at this length of the context
_ASSUMED_SLOPE = 0.3  # of a single token, for each token more, until a second width was measured
_FORGET_AFTER = 128  # calls


def padded_width(tokens: int) -> int:
    """Return the least of ``WIDTHS`` that so many tokens, at most the largest of them, go into."""
    return next(width for width in WIDTHS if width >= tokens)


class StepCosts:
    """Seconds that calls of one session take, by their width.

    A width that was not tried is estimated from those that were: between two by a straight line, beyond them by going
    on as between the last two. The first call of a width is not counted, since it may bind memory or capture a graph,
    and one that was not used for long is forgotten, since costs grow with the context.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._used: dict[int, int] = {}  # when each width was used last, in calls
        self._calls = 0
        self._leaves_out = False

    def leave_out(self) -> None:
        """Do not count the call that runs now: it makes something that the next ones of its width use."""
        self._leaves_out = True

    def add(self, width: int, seconds: float) -> None:
        """Note what a call took."""
        self._calls += 1
        left_out, self._leaves_out = self._leaves_out, False
        if width in self._used and not left_out:
            self._samples.setdefault(width, deque(maxlen=_SAMPLES)).append(seconds)
        self._used[width] = self._calls
        for old in [w for w in self._samples if w > 1 and self._calls - self._used[w] > _FORGET_AFTER]:
            del self._samples[old]

    @property
    def known(self) -> bool:
        """Whether a single token was measured: what others cost is compared with it."""
        return 1 in self._samples

    def seconds(self, width: int) -> float:
        """Return what a call of a width takes; a single token has to be known."""
        known = {w: median(samples) for w, samples in sorted(self._samples.items())}
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
