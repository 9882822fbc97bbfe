"""Cache policies: which rows of a KV cache stay. This module has their names and options, without loading any.

The command line is made of this table: a policy's name is what ``--cache-policy`` takes, an option's name is the rest
of ``--cache-…``. A test holds the table to the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gta_edge.errors import InputError
from gta_edge.support.choices import unknown

if TYPE_CHECKING:
    from gta_edge.runtime.cache_policies.base import CachePolicy

__all__ = ["COMMON", "OPTIONS", "POLICIES", "Method", "Option", "policy"]


@dataclass(frozen=True)
class Option:
    """An option of policies.

    Attributes:
        kind: of its value: int, float or str.
        help: one line for the command line.
    """

    kind: type
    help: str


@dataclass(frozen=True)
class Method:
    """A policy, as far as its class need not be loaded.

    Attributes:
        summary: what it keeps, for the command line.
        place: module in this package and class in it, with a dot between.
        options: names of its own options; ``COMMON`` are those of all.
    """

    summary: str
    place: str
    options: tuple[str, ...] = ()


OPTIONS = {
    "rows": Option(int, "Rows of each layer that stay; the mean where layers differ."),
    "interval": Option(int, "Tokens between evictions while generating (64)."),
    "residual_rows": Option(int, "Rows that stand for what was evicted (0 to 8)."),
    "sinks": Option(int, "First tokens that always stay (4)."),
    "recent": Option(float, "Share of the rows for the newest tokens."),
}
"""By name: a field of the policies' classes; on the command line with hyphens."""

COMMON = ("rows", "interval", "residual_rows")

POLICIES = {
    "window": Method("the first tokens and the newest", "window.Window", ("sinks",)),
    "h2o": Method("what all queries attended to most, and the newest", "h2o.H2O", ("recent",)),
}
"""By name, as ``--cache-policy`` takes it."""


def policy(name: str, **options: Any) -> CachePolicy:
    """Return a cache policy by its name.

    Args:
        name: one of ``POLICIES``.
        options: fields of its class; None leaves the default.

    Raises:
        InputError: a name that is none, an option that this policy does not have, or one that makes no sense.
    """
    if name not in POLICIES:
        raise InputError(*unknown("no cache policy is called {}; there are {}", name, POLICIES))
    allowed = COMMON + POLICIES[name].options
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in allowed:
            raise InputError(*unknown(f"cache policy {name} has no option {{}}; it has {{}}", option, allowed))
    module, _, kind = POLICIES[name].place.partition(".")
    made: CachePolicy = getattr(import_module(f"{__name__}.{module}"), kind)(**given)
    return made
