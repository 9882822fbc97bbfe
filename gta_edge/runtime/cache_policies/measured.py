"""Rows for each layer as they were measured to matter, over another policy's rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from gta_edge.errors import InputError
from gta_edge.runtime.cache_policies.base import CachePolicy, Decision, Floats, Integers, Rows, no_rows
from gta_edge.runtime.cache_policies.budgets import read_budgets, shared_out

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle

__all__ = ["LayerRows", "Measured", "OverRule"]


@dataclass(frozen=True, kw_only=True)
class OverRule(CachePolicy):
    """A policy that leaves to another one all but how many rows each layer has.

    Args:
        rule: what decides which rows stay. Its ``rows``, ``interval``, ``residual_rows`` and ``rotate`` are this one's.
    """

    rule: CachePolicy
    rows: int | None = field(default=None, init=False)
    interval: int = field(default=64, init=False)
    residual_rows: int = field(default=0, init=False)
    rotate: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for option in ("rows", "interval", "residual_rows", "rotate"):
            object.__setattr__(self, option, getattr(self.rule, option))  # a frozen dataclass derives its fields so

    @property
    def least_rows(self) -> int:
        return self.rule.least_rows

    @property
    def observe(self) -> Literal["mass", "last"] | None:
        return self.rule.observe

    def weights(self, positions: Integers, visible: Integers) -> tuple[Floats, Floats]:
        return self.rule.weights(positions, visible)

    def keep(self, rows: Rows) -> Decision:
        return self.rule.keep(rows)

    def _ordered(self, rows: Rows) -> Integers:
        return self.rule._ordered(rows)


@dataclass(frozen=True, kw_only=True)
class LayerRows(OverRule):
    """A rule with a number of rows of its own for every layer.

    Args:
        rule: what decides which rows stay.
        layer_rows: of each layer, at least what the rule needs.

    Raises:
        InputError: a layer with fewer.
    """

    name: ClassVar[str] = "measured"

    layer_rows: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layer_rows, default=0) < self.least_rows:
            raise InputError(
                f"cache policy {self.rule.name}: a layer has {min(self.layer_rows, default=0)} rows",
                f"give each at least {self.least_rows}",
            )

    def budgets(self, layers: int) -> Integers:
        if layers != len(self.layer_rows):
            raise InputError(
                f"there are rows for {len(self.layer_rows)} layers, and the model has {layers}",
                "give the budgets of this model",
            )
        return np.array(self.layer_rows, np.int64)


@dataclass(frozen=True, kw_only=True)
class Measured(OverRule):
    """Budgets for each layer, as ``gta-edge calibrate-cache`` found them for a bundle, over another policy's rule.

    The rule's ``rows`` is the mean over the layers. Layers differ by far more than rules do: on the shipped model the
    three in the middle need next to nothing.

    Args:
        rule: what decides which rows stay.
        budgets_file: file of budgets; by default those that lie in the bundle.

    Raises:
        InputError: the rule has no ``rows``.
    """

    name: ClassVar[str] = "measured"

    budgets_file: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is None:
            raise no_rows(self.name)

    def for_bundle(self, bundle: Bundle) -> LayerRows:
        assert self.rows is not None
        shares = read_budgets(bundle, self.budgets_file).rows
        rows = shared_out(self.rows * len(shares), shares, self.least_rows)
        return LayerRows(rule=self.rule, layer_rows=tuple(rows.tolist()))

    def budgets(self, layers: int) -> Integers:
        raise InputError("the budgets of cache policy measured are a bundle's", "give a bundle that was calibrated")
