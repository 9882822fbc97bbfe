"""What decides which rows of a cache stay: the interface of all policies, in numpy, with no backend and no model in it.

A policy says three things. What the attention has to observe, and with which weight of every query (``observe`` and
``weights``, which go into the op's inputs ``query_weight`` and ``decay``). How many rows each layer may have
(``budgets``). And for one layer of one sequence at a time, which of the rows in use stay, and where the others go
(``keep``): dropped, or folded into a residual row, which stands for many. Moving rows is the session's business, and
when to ask is too: every ``interval`` tokens, and after each chunk of a prompt.

The same decision is made wherever the same numbers come in: rows may lie in any order, and of rows with equal scores
the one of the newer token stays. The newest token always stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.plugins.attention.definition import MAX_BIAS_ROWS
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle

__all__ = [
    "DROPPED",
    "MAX_RESIDUAL_ROWS",
    "CachePolicy",
    "Decision",
    "Floats",
    "Integers",
    "Mask",
    "Rows",
    "check_share",
    "check_whole",
]

MAX_RESIDUAL_ROWS = MAX_BIAS_ROWS
"""As many biases as the op takes (its input ``row_bias``)."""

DROPPED = -1
"""Of a row that is not kept: it is folded into no residual row."""

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """The rows in use of one layer of one sequence, in any order.

    Attributes:
        layer: counted from 0.
        budget: rows that may stay; None where the method decides.
        length: tokens seen. The newest is at position ``length - 1``.
        positions: of each row's token, int64 [n]; of a residual row, of the newest that was folded into it.
        received: what ``observe`` asked for, float32 [n]; None where nothing was observed.
        counts: tokens that each row stands for, float32 [n]: 1, and more for residual rows.
        begun: which are residual rows, bool [n], one that stands for a single token so far among them; None: those that
            stand for several.
    """

    layer: int
    budget: int | None
    length: int
    positions: Integers
    received: Floats | None
    counts: Floats
    begun: Mask | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def residual(self) -> Mask:
        """Rows that others are folded into, bool [n]. What they have received is of no use: it is not folded."""
        return self.counts > 1 if self.begun is None else self.begun

    @property
    def age(self) -> Integers:
        """By how many tokens each row's is older than the newest, int64 [n]; 0 is the newest."""
        return self.length - 1 - self.positions


@dataclass(frozen=True)
class Decision:
    """What becomes of each row.

    Attributes:
        keep: rows that stay, bool [n].
        residual: int64 [n], of rows that do not stay: index of the residual row that each is folded into, or
            ``DROPPED``. None where all of them are dropped, or none is. Of rows that stay it means nothing.
    """

    keep: Mask
    residual: Integers | None = None


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """A method of keeping a cache small.

    Args:
        rows: that stay, per layer; the mean over layers where budgets differ. None where the method decides.
        interval: tokens between two evictions while tokens are generated. The cache has room for as many more. 64
            is as good as 1 on the shipped model.
        residual_rows: rows that stand for what was evicted, at most ``MAX_RESIDUAL_ROWS``; 0 drops it. They are part
            of ``rows``. A residual row is the mean key and the mean value of the m tokens folded into it, and its
            scores get a bias of log m (ZSMerge, arXiv 2503.10714, with exponent 1, which measured better than its 0.6).
        rotate: go on past the model's last position, by renumbering the rows that stay and rotating their keys. That is
            harmless for a window, whose rows are neighbours, and harmful for rows that lie scattered, which lose the
            distances between them.

    Raises:
        InputError: an option that makes no sense, by its name.
    """

    name: ClassVar[str]
    needs_rows: ClassVar[bool] = True

    rows: int | None = None
    interval: int = 64
    residual_rows: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        check_whole(self, "interval", least=1)
        check_whole(self, "residual_rows", least=0, most=MAX_RESIDUAL_ROWS)
        if not isinstance(self.rotate, bool | np.bool_):
            raise InputError(f"cache policy {self.name}: rotate is {brief(self.rotate)}", "give True or False")
        if self.rows is None and not self.needs_rows:
            return
        if self.rows is None:
            raise no_rows(self.name)
        check_whole(self, "rows", least=self.least_rows)

    def for_bundle(self, bundle: Bundle) -> CachePolicy:
        """Return the policy as a session of this bundle needs it: itself, where it knows no model.

        Raises:
            InputError: it was made for another model.
        """
        return self

    # --- what to observe, and how much room -------------------------------------------------------------------------

    @property
    @abstractmethod
    def observe(self) -> Literal["mass", "last"] | None:
        """What rows receive, the op's attribute of that name; None needs no observation."""

    @property
    def least_rows(self) -> int:
        """Rows that every layer needs."""
        return self.residual_rows + 1

    @property
    def bias_rows(self) -> int:
        """Rows that the op's ``row_bias`` is for (R); 0 without residual rows."""
        return self.residual_rows

    def budgets(self, layers: int) -> Integers | None:
        """Return how many rows of each layer stay, int64 [L], residual rows included.

        Returns:
            None where the method decides, and a cache may be as long as the context.
        """
        return None if self.rows is None else np.full(layers, self.rows, np.int64)

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        """Return how much each query of one call counts, and what remains of what rows received before.

        Args:
            positions: of the queries' tokens, int64 [B, T].
            visible: rows that each query sees, its own included, int64 [B, T]; 0 for padding, which counts nothing.

        Returns:
            ``query_weight`` float32 [B, T] and ``decay`` float32 [B], the op's inputs.
        """
        return (visible > 0).astype(np.float32), np.ones(len(visible), np.float32)

    # --- which rows stay --------------------------------------------------------------------------------------------

    def keep(self, rows: Rows) -> Decision:
        """Decide for one layer of one sequence. Nothing is decided while there are no more rows than the budget."""
        everything = np.ones(len(rows), np.bool_)
        if rows.budget is not None and len(rows) <= rows.budget:
            return Decision(everything)
        residual = rows.residual
        room = len(rows) if rows.budget is None else max(1, rows.budget - self.residual_rows)
        keep = residual.copy()
        keep[self._ordered(rows)[:room]] = True
        if keep.all():
            return Decision(everything)
        return Decision(keep, self._folded(rows, keep))

    @abstractmethod
    def _ordered(self, rows: Rows) -> Integers:
        """Return the indices of the rows worth keeping, best first; residual rows are not among them."""

    def _folded(self, rows: Rows, keep: Mask) -> Integers | None:
        """Share out what is evicted among the residual rows in runs of equal length, the oldest into the first.

        ZSMerge does so with a prompt; later it takes the residual row of the most similar key, which is not known here.
        """
        if not self.residual_rows:
            return None
        evicted, runs = np.flatnonzero(~keep), self.residual_rows
        if rows.budget is None:  # as few rows may stay as the method likes, and every residual row needs a place
            runs = min(runs, int(keep.sum()))
        into = np.full(len(rows), DROPPED, np.int64)
        by_age = evicted[np.argsort(rows.positions[evicted])]
        into[by_age] = np.arange(len(evicted)) * runs // len(evicted)
        return into


# --- checking options ----------------------------------------------------------------------------------------------


def no_rows(name: str) -> InputError:
    """Return the error of a policy that needs ``rows`` and was given none."""
    return InputError(f"cache policy {name} needs rows", "say how many of each layer stay (--cache-rows)")


def check_whole(policy: CachePolicy, option: str, *, least: int, most: int | None = None, odd: bool = False) -> None:
    """Refuse an option that is no whole number in a range, or no odd one.

    Raises:
        InputError: it is none.
    """
    value = getattr(policy, option)
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most) or (odd and value % 2 == 0):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        kind = "an odd" if odd else "a whole"
        raise InputError(f"cache policy {policy.name}: {option} is {brief(value)}", f"give {kind} number {allowed}")


def check_share(policy: CachePolicy, option: str) -> None:
    """Refuse an option that is no number from 0 to 1.

    Raises:
        InputError: it is none.
    """
    value = getattr(policy, option)
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise InputError(f"cache policy {policy.name}: {option} is {brief(value)}", "give a number from 0 to 1")
