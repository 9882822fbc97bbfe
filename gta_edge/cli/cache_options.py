"""Options that say which rows of a KV cache stay, made of the table of policies; several commands take them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gta_edge.cli.choices import checked, completed
from gta_edge.cli.option_groups import OptionGroup
from gta_edge.runtime.cache_policies import COMMON, OPTIONS, POLICIES

if TYPE_CHECKING:
    from gta_edge.runtime.cache_policies.base import CachePolicy

__all__ = ["CacheOptions"]

_FLAG = "--cache-"


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """A cache policy as it was asked for.

    Attributes:
        choice: its ``name``, and those of its options that were given; None without a policy. It can be sent as JSON.
    """

    choice: dict[str, Any] | None = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [_policy_parameter(), *map(_parameter, _in_order())]

    @classmethod
    def collected(cls, given: Mapping[str, Any]) -> CacheOptions:
        name = given[_argument("policy")]
        options = {option: value for option in OPTIONS if (value := given[_argument(option)]) is not None}
        if name is not None:
            return cls({"name": name, **options})
        if options:
            raise typer.BadParameter(f"{_flag(next(iter(options)))} is for a cache policy: give --cache-policy too")
        return cls()

    def require_whole(self, option: str) -> None:
        """Refuse a policy, as wrong usage, beside an option that keeps the cache in files."""
        if self.choice is not None:
            raise typer.BadParameter(f"{option} needs every row of the cache: leave out --cache-policy")

    def policy(self) -> CachePolicy | None:
        """Return the policy that was asked for.

        Raises:
            InputError: an option that the policy does not have, or that makes no sense.
        """
        if self.choice is None:
            return None
        from gta_edge.runtime.cache_policies import policy

        return policy(**self.choice)


def _in_order() -> list[str]:
    return [*COMMON, *(name for name in OPTIONS if name not in COMMON)]


def _flag(option: str) -> str:
    return _FLAG + option.replace("_", "-")


def _policy_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--cache-policy",
        metavar="NAME",
        help=f"Which rows of the cache stay: {', '.join(POLICIES)}; all by default.",
        parser=checked("no cache policy is called {}; there are {}", lambda: POLICIES),
        autocompletion=completed(lambda: POLICIES),
    )
    return _made("policy", Annotated[str | None, option])


def _parameter(name: str) -> inspect.Parameter:
    kind: Any = OPTIONS[name].kind
    return _made(name, Annotated[kind | None, typer.Option(_flag(name), help=OPTIONS[name].help)])


def _made(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(_argument(name), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _argument(name: str) -> str:
    return f"cache_{name}"
