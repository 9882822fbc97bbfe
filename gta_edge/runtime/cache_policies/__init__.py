"""Cache policies: which rows of a KV cache stay. This module has their names and options, without loading any.

The command line is made of this table: a policy's name is what ``--cache-policy`` takes, an option's name is the rest
of ``--cache-…``. A test holds the table to the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.errors import InputError
from gta_edge.support.choices import unknown
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from gta_edge.runtime.cache_policies.base import CachePolicy

__all__ = ["COMMON", "OPTIONS", "POLICIES", "Method", "Option", "policy"]


@dataclass(frozen=True)
class Option:
    """An option of policies.

    Attributes:
        kind: of its value: int, float, str or bool.
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
    "rotate": Option(bool, "Go on past the last position; harmless for a window alone."),
    "sinks": Option(int, "First tokens that always stay (4)."),
    "recent": Option(float, "Share of the rows for the newest tokens."),
    "window": Option(int, "Newest tokens: they stay, and their queries decide."),
    "pooling": Option(int, "Neighbouring tokens that share their largest score (1)."),
    "decay": Option(float, "What remains of a score, per token (0.98)."),
    "shrink": Option(float, "Share of its rows that the last layers hand on (0.9)."),
    "schedule": Option(str, "Fall with depth: cosine, linear or constant."),
    "rule": Option(str, "Policy that decides inside measured budgets (zsmerge)."),
    "budgets": Option(str, "File of rows per layer; measured: the bundle's own."),
}
"""By name: a field of the policies' classes; on the command line with hyphens."""

COMMON = ("rows", "interval", "residual_rows", "rotate", "budgets")
"""Options of all policies. ``budgets`` makes any of them one of ``measured``, with itself as the rule."""

POLICIES = {
    "window": Method("the first tokens and the newest", "window.Window", ("sinks",)),
    "h2o": Method("what all queries attended to most", "h2o.H2O", ("recent",)),
    "tova": Method("what the last query attends to most", "tova.TOVA"),
    "snapkv": Method("what the last queries attend to most", "snapkv.SnapKV", ("window", "pooling")),
    "corm": Method("what any recent query found important", "corm.CORM", ("window",)),
    "zsmerge": Method("what attracts most, fading; the rest merged", "zsmerge.ZSMerge", ("decay", "recent")),
    "pyramid": Method("fewer rows the deeper the layer", "pyramid.Pyramid", ("sinks", "recent", "shrink", "schedule")),
    "measured": Method("rows per layer as calibrate-cache found", "measured.Measured", ("rule",)),
}
"""By name, as ``--cache-policy`` takes it."""

_RULE = "zsmerge"


def policy(name: str, **options: Any) -> CachePolicy:
    """Return a cache policy by its name.

    Args:
        name: one of ``POLICIES``.
        options: of the policy, by the names of ``OPTIONS``; None leaves the default. ``measured`` takes its rule's too.

    Raises:
        InputError: a name that is none, an option that this policy does not have, or one that makes no sense.
    """
    given = {option: value for option, value in options.items() if value is not None}
    if name == "measured":
        rule = given.pop("rule", _RULE)
        _check_name(rule)
        if rule == name:
            raise InputError("cache policy measured: rule is 'measured'", "give the policy that decides in its budgets")
        if "rows" not in given:
            from gta_edge.runtime.cache_policies.base import no_rows

            raise no_rows(name)  # not in the name of a rule that nobody may have asked for
        return _measured(_made(rule, given), given)
    _check_name(name)
    made = _made(name, given)
    return _measured(made, given) if "budgets" in given else made


def _made(name: str, given: dict[str, Any]) -> CachePolicy:
    allowed = COMMON + POLICIES[name].options
    for option in given:
        if option not in allowed:
            raise InputError(*unknown(f"cache policy {name} has no option {{}}; it has {{}}", option, allowed))
    own = {option: value for option, value in given.items() if option != "budgets"}
    made: CachePolicy = _class(name)(**own)
    return made


def _measured(rule: CachePolicy, given: dict[str, Any]) -> CachePolicy:
    file = given.get("budgets")
    if file is not None and not isinstance(file, str | Path):
        raise InputError(f"cache policy {rule.name}: budgets is {brief(file)}", "give the path of a file of budgets")
    made: CachePolicy = _class("measured")(rule=rule, budgets_file=file)
    return made


def _class(name: str) -> Any:
    module, _, kind = POLICIES[name].place.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), kind)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name not in POLICIES:
        raise InputError(*unknown("no cache policy is called {}; there are {}", name, POLICIES))
